// Which kernel a product gets.
#include <algorithm>

#include "linear.h"
#if defined(LACONIC_X86)
#include <cpuid.h>
#endif

namespace laconic {

Level level_of(const std::string& name) {
#if defined(LACONIC_X86)
    if (name == "avx512") return Level::avx512;
    if (name == "avx2") return Level::avx2;
#endif
    (void)name;
    return Level::plain;
}

Weight weight_of(const Stored& s) {
    const int64_t wide = s.group < 1 || s.group > s.m ? s.m : s.group;
    return {reinterpret_cast<const uint8_t*>(s.codes), s.stride, reinterpret_cast<const uint16_t*>(s.scales), reinterpret_cast<const uint8_t*>(s.zeros),
            s.zero_stride, s.n, s.m, wide, wide ? (s.m + wide - 1) / wide : 0, s.bits, s.half};
}

#if defined(LACONIC_X86)
bool pairs() {
    static const bool there = [] {
        __builtin_cpu_init();
        return bool(__builtin_cpu_supports("avx512bf16"));
    }();
    return there;
}

bool only_pairs() {
    static const bool there = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
        return pairs() && !tiles;
    }();
    return there;
}
#endif

bool multiply(const Product& p, Level level) {
#if defined(LACONIC_X86)
    if (level == Level::avx512 && p.bf16 && p.rows > SOME && only_pairs() && (p.w.group % 16 == 0 || p.w.group >= p.w.m)) {
        panels_bf16(p);
        return true;
    }
    if (level == Level::avx512 && regular(p.w)) {
        thread_local Room room;
        Prepared q;
        q.planes = planes(p.w.bits);
        const int64_t width = 32 * q.planes;
        q.blocks = (p.w.m + width - 1) / width;
        q.groups = p.w.groups;
        q.padded = (q.groups + 15) / 16 * 16;
        q.terms = p.bf16 ? 1 : 2;
        const size_t bytes = size_t(p.rows * q.blocks * width) * 2 * size_t(q.terms), scale = size_t(p.rows * q.blocks + 15) / 16 * 64;
        uint8_t* at = room.of(bytes + scale + size_t(p.rows * q.padded) * 4);
        q.x = reinterpret_cast<int16_t*>(at);
        q.scale = reinterpret_cast<float*>(at + bytes);
        q.sums = reinterpret_cast<float*>(at + bytes + scale);
        if (!prepare_avx512(p, q)) return false;
        product_avx512(p, q);
        room.shrink();
        return true;
    }
    if (level == Level::avx2 && regular_avx2(p.w)) return product_avx2(p);
#endif
    (void)level;
    product_plain(p);
    return true;
}

bool multiply_int8(const Product& p, Level level) {
#if defined(LACONIC_X86)
    if (level == Level::avx512 && regular(p.w)) return int8_avx512(p);
    if (level == Level::avx2 && regular_avx2(p.w)) return int8_avx2(p);
#endif
    (void)level;
    return int8_plain(p);
}

void dense(const Weight& w, float* out, int threads, Level level) {
#if defined(LACONIC_X86)
    if (level == Level::avx512 && (w.group % 16 == 0 || w.group >= w.m)) return dense_avx512(w, out, threads);
    if (level == Level::avx2 && regular_avx2(w)) return dense_avx2(w, out, threads);
#endif
    (void)level;
    dense_plain(w, out, threads);
}

} // namespace laconic
