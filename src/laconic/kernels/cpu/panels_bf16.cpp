// AVX-512 with BF16: products of many rows of x in bf16 with codes, which are rounded to bf16 as torch would before such a product, a few rows of them at a
// time. The values of a group are rounded once and looked up where a few registers hold those of a block; else every code becomes a number.
#include "lookup_avx512.h"
#include "panels_avx512.h"

namespace laconic {

namespace {

inline __m512i both(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// what codes stand for before their zero and scale come in
inline float value_of(const Weight&, int code) { return float(code); }
inline float value_of(const Leveled& w, int code) { return from_bf16(w.table[code]); }

// scales of up to 16 groups of a row
inline __m512 scales_of(const Weight& w, int64_t row, int64_t group, int64_t count) {
    return widen(_mm256_maskz_loadu_epi16(__mmask16(first(count)), w.scales + row * w.groups + group));
}
inline __m512 scales_of(const Leveled& w, int64_t row, int64_t group, int64_t count) {
    return scales_at(w, w.scales + (row * w.groups + group) * w.wide(), __mmask16(first(count)));
}

// their zeros
template <int BITS>
inline __m512 zeros_of(const Weight& w, const Bytes<BITS>& bytes, int64_t row, int64_t group, int64_t count) {
    const __m512 unit = _mm512_set1_ps(w.unit());
    if (!w.zeros) return _mm512_mul_ps(_mm512_set1_ps(float(w.middle())), unit);
    const int64_t odd = group % 64;
    if (odd + count <= 64) {
        const __m512i from = _mm512_add_epi8(_mm512_castsi128_si512(_mm_set_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)),
                                             _mm512_set1_epi8(char(odd)));
        const __m512i some = _mm512_permutexvar_epi8(from, zeros_of(w, bytes, row, group - odd));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm512_castsi512_si128(some))), unit);
    }
    alignas(64) float zeros[16] = {};
    for (int64_t i = 0; i < count; i++) zeros[i] = zero_at(w, row, group + i);
    return _mm512_load_ps(zeros);
}
template <int BITS>
inline __m512 zeros_of(const Leveled&, const Bytes<BITS>&, int64_t, int64_t, int64_t) {
    return _mm512_setzero_ps();
}

// Asks for what lies at some columns of a row and for its scales; far ahead, so no nearer than the second cache. In line always: GCC drops calls of what
// only asks.
#define LACONIC_ASK inline __attribute__((always_inline)) void
LACONIC_ASK ask(const void* scales, const uint8_t* line, int bits, int64_t from, int64_t count) {
    _mm_prefetch(static_cast<const char*>(scales), _MM_HINT_T1);
    const uint8_t *at = line + from / 8 * bits, *end = at + count * bits / 8;
    for (; at < end; at += 64) _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}
LACONIC_ASK ask(const Weight& w, int64_t row, int64_t from, int64_t count) {
    ask(w.scales + row * w.groups + from / w.group, w.codes + row * w.stride, w.bits, from, count);
}
LACONIC_ASK ask(const Leveled& w, int64_t row, int64_t from, int64_t count) {
    ask(w.scales + (row * w.groups + from / w.group) * w.wide(), w.codes + row * w.stride, w.bits, from, count);
}

// Which group each fourth column belongs to, counted from the first of a span; 64 columns to a vector. Groups are a multiple of 4.
struct Groups {
    int64_t base, count;
    __m512i index[SPAN / 64];

    Groups(int64_t group, int64_t groups, int64_t from) : base(from / group) {
        alignas(64) int32_t at[16];
        int64_t now = 0, until = (base + 1) * group - from;
        for (int64_t b = 0; b < SPAN / 64; b++) {
            for (int64_t i = 0; i < 16; i++) {
                if (64 * b + 4 * i >= until) until += group, now++;
                at[i] = int32_t(now);
            }
            index[b] = _mm512_load_si512(at);
        }
        count = std::min<int64_t>(groups - base, 16);
    }
};

// planes of a block, and the bytes that it is read from
constexpr int planes_of(int bits) { return bits == 4 ? 4 : bits == 2 ? 8 : 2; }

// Codes of which a block has so few values, all groups together, that 32 * PARTS places hold them.
template <int BITS, int PARTS, class W>
struct Tables {
    static constexpr int PLANES = planes_of(BITS), VALUES = 1 << BITS, BYTES = PLANES == 2 ? 8 * BITS : 64;
    static constexpr int64_t BLOCK = 32 * PLANES;
    const W& w;
    LACONIC_ASK ask(int64_t row, int64_t from, int64_t count) const { laconic::ask(w, row, from, count); }
    const Bytes<BITS> bytes;
    int64_t share; // groups of a block
    __m512 values[2 * PARTS];
    __m512i group[2 * PARTS]; // of each place of the tables
    __m512i places;           // where the table of each word's group begins
    __mmask32 second;         // words whose table lies in the second half

    struct Span {};
    Span span(int64_t) const { return {}; }

    // how many parts a matrix needs; 0: it is none for tables
    static int parts(const W& w) {
        const int64_t share = w.group >= BLOCK || w.group >= w.m ? 1 : BLOCK / w.group;
        if (share > 1 ? BLOCK % w.group != 0 : w.group < w.m && w.group % BLOCK != 0) return 0;
        const int64_t all = share * VALUES;
        return all <= 32 ? 1 : all <= 64 ? 2 : all <= 128 ? 4 : 0;
    }

    explicit Tables(const W& w) : w(w), share(w.group >= BLOCK || w.group >= w.m ? 1 : BLOCK / w.group) {
        alignas(64) float value[16];
        alignas(64) int32_t of[16];
        alignas(64) uint16_t place[32];
        for (int v = 0; v < 2 * PARTS; v++) {
            for (int i = 0; i < 16; i++) value[i] = value_of(w, (16 * v + i) % VALUES), of[i] = (16 * v + i) / VALUES;
            values[v] = _mm512_load_ps(value), group[v] = _mm512_load_si512(of);
        }
        second = 0;
        for (int i = 0; i < 32; i++) {
            place[i] = uint16_t(i * share / 32 * VALUES);
            if (place[i] >= 64) second |= __mmask32(1) << i;
        }
        places = _mm512_load_si512(place);
    }

    void row(const Span&, int64_t row, int64_t from, int64_t count, uint16_t* out) const {
        const uint8_t *line = w.codes + row * w.stride, *at = line + from / 8 * BITS, *end = line + w.stride;
        const __m512i mask = _mm512_set1_epi16(VALUES - 1);
        __m512i table[PARTS];
        // of the block at `next` a new table has to be made
        int64_t first_group = from / w.group, next = 0;
        for (int64_t j = 0; j < count; j += BLOCK, at += BYTES) {
            if (j >= next) {
                const int64_t some = std::min(share, w.groups - first_group);
                const __m512 scales = scales_of(w, row, first_group, some), zeros = zeros_of(w, bytes, row, first_group, some);
                __m512 part[2];
#pragma GCC unroll 8
                for (int v = 0; v < 2 * PARTS; v++) {
                    const __m512 zero = _mm512_permutexvar_ps(group[v], zeros);
                    part[v % 2] = _mm512_mul_ps(_mm512_sub_ps(values[v], zero), _mm512_permutexvar_ps(group[v], scales));
                    if (v % 2) table[v / 2] = both(part[0], part[1]);
                }
                first_group += some;
                next = share > 1 ? j + BLOCK : first_group * w.group - from;
            }
            __m512i v = end - at >= BYTES && BYTES == 64 ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(first(std::min<int64_t>(end - at, BYTES)), at);
            if constexpr (PLANES == 2) v = bytes.of(v);
#pragma GCC unroll 8
            for (int k = 0; k < PLANES; k++) {
                const __m512i word = k ? _mm512_srli_epi16(v, 16 / PLANES * k) : v;
                // (word & mask) | places
                const __m512i index = _mm512_ternarylogic_epi32(word, mask, places, 0xEA);
                __m512i found;
                if constexpr (PARTS == 1) found = _mm512_permutexvar_epi16(index, table[0]);
                else found = _mm512_permutex2var_epi16(table[0], index, table[1]);
                if constexpr (PARTS == 4) found = _mm512_mask_blend_epi16(second, found, _mm512_permutex2var_epi16(table[2], index, table[3]));
                _mm512_storeu_si512(out + j + 32 * k, found);
            }
        }
    }
};

// Any codes: (code - zero) * scale, in that order, then rounded. Planes of every fourth column, as the bytes of words of 32 bits give them.
template <int BITS>
struct Straight {
    static constexpr int PLANES = 4;
    const Weight& w;
    LACONIC_ASK ask(int64_t row, int64_t from, int64_t count) const { laconic::ask(w, row, from, count); }
    const Bytes<BITS> bytes;

    using Span = Groups;
    Groups span(int64_t from) const { return Groups(w.group, w.groups, from); }

    void row(const Groups& groups, int64_t row, int64_t from, int64_t count, uint16_t* out) const {
        const uint8_t *line = w.codes + row * w.stride, *at = line + from / 8 * BITS, *end = line + w.stride;
        const __m512 scales = scales_of(w, row, groups.base, groups.count), zeros = zeros_of(w, bytes, row, groups.base, groups.count);
        for (int64_t j = 0; j < count; j += 128) {
            __m512i codes[2];
            __m512 scale[2], zero[2];
#pragma GCC unroll 2
            for (int64_t b = 0; b < 2; b++, at += 8 * BITS) {
                codes[b] = at < end ? bytes.load(at, end - at) : _mm512_setzero_si512();
                scale[b] = _mm512_permutexvar_ps(groups.index[j / 64 + b], scales), zero[b] = _mm512_permutexvar_ps(groups.index[j / 64 + b], zeros);
            }
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                __m512 part[2];
#pragma GCC unroll 2
                for (int b = 0; b < 2; b++) {
                    __m512i code = k ? _mm512_srli_epi32(codes[b], 8 * k) : codes[b];
                    if (k < 3) code = _mm512_and_si512(code, _mm512_set1_epi32(255));
                    part[b] = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(code), zero[b]), scale[b]);
                }
                _mm512_storeu_si512(out + j + 32 * k, both(part[0], part[1]));
            }
        }
    }
};

// The same of codes of more bits that name values.
template <int BITS, Kind KIND>
struct Named {
    static constexpr int PLANES = 4;
    const Leveled& w;
    LACONIC_ASK ask(int64_t row, int64_t from, int64_t count) const { laconic::ask(w, row, from, count); }
    const Bytes<BITS> bytes;
    const Values<BITS, KIND> values;

    explicit Named(const Leveled& w) : w(w), values(w.table) {}

    using Span = Groups;
    Groups span(int64_t from) const { return Groups(w.group, w.groups, from); }

    void row(const Groups& groups, int64_t row, int64_t from, int64_t count, uint16_t* out) const {
        const uint8_t *line = w.codes + row * w.stride, *at = line + from / 8 * BITS, *end = line + w.stride;
        const __m512 scales = scales_of(w, row, groups.base, groups.count);
        for (int64_t j = 0; j < count; j += 128) {
            __m512i codes[2];
            __m512 scale[2];
#pragma GCC unroll 2
            for (int64_t b = 0; b < 2; b++, at += 8 * BITS) {
                codes[b] = at < end ? bytes.load(at, end - at) : _mm512_setzero_si512();
                scale[b] = _mm512_permutexvar_ps(groups.index[j / 64 + b], scales);
            }
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++) {
                __m512 even[2], odd[2];
#pragma GCC unroll 2
                for (int b = 0; b < 2; b++) {
                    const __m512i code = k ? _mm512_srli_epi16(codes[b], 8) : _mm512_and_si512(codes[b], _mm512_set1_epi16(255));
                    const __m512i words = values.of(code);
                    even[b] = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), scale[b]);
                    odd[b] = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536))), scale[b]);
                }
                _mm512_storeu_si512(out + j + 32 * k, both(even[0], even[1]));
                _mm512_storeu_si512(out + j + 32 * (k + 2), both(odd[0], odd[1]));
            }
        }
    }
};

template <class Source>
void product(Many p, int64_t m, const Source& source) {
    p.planes = Source::PLANES;
    over_panels<Paired>(p, LONG, SPAN / 2, [&](const Part& part, int32_t* panel) { fill_rows(source, m, part, panel); });
}

// by tables where there are so few values; false: there are more
template <int BITS, class W>
bool by_tables(const Many& p, const W& w) {
    switch (Tables<BITS, 1, W>::parts(w)) {
    case 1: return product(p, w.m, Tables<BITS, 1, W>(w)), true;
    case 2: return product(p, w.m, Tables<BITS, 2, W>(w)), true;
    case 4: return product(p, w.m, Tables<BITS, 4, W>(w)), true;
    default: return false;
    }
}

} // namespace

void panels_bf16(const Product& p) {
    const Weight& w = p.w;
    const Many many{static_cast<const uint8_t*>(p.x), 2 * w.m, 2 * w.m, p.rows, w.n, p.narrow ? nullptr : p.out, p.narrow, p.threads};
    const auto with = [&](auto bits) {
        constexpr int BITS = decltype(bits)::value;
        if constexpr (BITS <= 5)
            if (by_tables<BITS>(many, w)) return;
        product(many, w.m, Straight<BITS>{w, {}});
    };
    switch (w.bits) {
    case 1: return with(std::integral_constant<int, 1>());
    case 2: return with(std::integral_constant<int, 2>());
    case 3: return with(std::integral_constant<int, 3>());
    case 4: return with(std::integral_constant<int, 4>());
    case 5: return with(std::integral_constant<int, 5>());
    case 6: return with(std::integral_constant<int, 6>());
    case 7: return with(std::integral_constant<int, 7>());
    default: return with(std::integral_constant<int, 8>());
    }
}

void lookup_panels_bf16(const Looked& p) {
    const Leveled& w = p.w;
    const Many many{static_cast<const uint8_t*>(p.x), 2 * w.m, 2 * w.m, p.rows, w.n, nullptr, static_cast<uint16_t*>(p.out), p.threads};
    by_kind(w, [&](auto bits, auto kind) {
        constexpr int BITS = decltype(bits)::value;
        if constexpr (BITS <= 5)
            if (by_tables<BITS>(many, w)) return;
        product(many, w.m, Named<BITS, decltype(kind)::value>(w));
    });
}

} // namespace laconic
