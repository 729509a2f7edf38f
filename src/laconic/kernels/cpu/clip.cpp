#include "clip_loop.h"

namespace laconic {

void clip_plain(const Clip& p) { losses(p); }

} // namespace laconic
