// The vector vocabulary: sixteen float lanes, about fifteen operations, one section per instruction set. A file that
// defines SPARSEFOLD_ISA as `generic`, `avx2`, `avx512` or `neon` gets its own copy in a namespace of that name, so
// that the linker can never keep one instruction set's copy for another. NEON is asked for by SPARSEFOLD_NEON: every
// 64-bit Arm compiler has it, also where the plain loops are wanted.
#pragma once
#ifndef SPARSEFOLD_ISA
#error "define SPARSEFOLD_ISA before including simd.hpp"
#endif
#include "kernels.hpp"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(SPARSEFOLD_NEON)
#include <arm_neon.h>
#endif

#define SF_INLINE inline __attribute__((always_inline))

namespace sparsefold {
namespace SPARSEFOLD_ISA {

SF_INLINE float widen(float a) { return a; }
SF_INLINE float widen(int8_t a) { return a; }
SF_INLINE float widen(bf16 a) {
    const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
    float out;
    __builtin_memcpy(&out, &bits, sizeof out);
    return out;
}

#if defined(__AVX2__) || defined(__AVX512F__)
SF_INLINE __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
SF_INLINE __m256 load8(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
SF_INLINE __m256 load8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
SF_INLINE __m128 load4(const float* p) { return _mm_loadu_ps(p); }
SF_INLINE __m128 load4(const bf16* p) {
    const __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm_castsi128_ps(_mm_slli_epi32(wide, 16));
}
SF_INLINE __m128 load4(const int8_t* p) { return _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_loadu_si32(p))); }
#endif

#if defined(__AVX512F__)

constexpr uint32_t kAccumulators = 8;  // sixteen-lane sums that fit the registers
constexpr uint32_t kHiding = 8;        // of which so many hide the latency of a multiply-add
constexpr uint32_t kTileGroups = 16;   // sums of one complementary tile

struct F16 {
    __m512 v;
};
SF_INLINE F16 set1(float a) { return {_mm512_set1_ps(a)}; }
SF_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
SF_INLINE F16 load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
SF_INLINE F16 load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
SF_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
SF_INLINE F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
SF_INLINE F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
SF_INLINE F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
SF_INLINE F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
SF_INLINE F16 sqrt(F16 a) { return {_mm512_sqrt_ps(a.v)}; }
SF_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
SF_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }                // NaN in b wins
SF_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }                // NaN in b wins
SF_INLINE F16 round(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
SF_INLINE F16 scale2(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n, n integral in [-126, 127]
SF_INLINE uint32_t not_le(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ); }  // bit i: !(a_i <= b_i)
SF_INLINE F16 keep(uint32_t bits, F16 a) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a.v)}; }
SF_INLINE F16 add_where(F16 a, uint32_t bits, F16 b) {  // a + b in the lanes of `bits`
    return {_mm512_mask_add_ps(a.v, static_cast<__mmask16>(bits), a.v, b.v)};
}
SF_INLINE uint32_t equal(const uint8_t* p, uint8_t a) {  // bit i: p[i] == a
    return _mm_cmpeq_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)),
                               _mm_set1_epi8(static_cast<char>(a)));
}
SF_INLINE F16 load_first(const float* p, uint32_t n) {  // lanes from n on are 0 and not read
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
SF_INLINE void store_first(float* p, uint32_t n, F16 a) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
SF_INLINE __m512 load_masked(__mmask16 m, const float* p) { return _mm512_maskz_loadu_ps(m, p); }
SF_INLINE __m512 load_masked(__mmask16 m, const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}
SF_INLINE __m512 load_masked(__mmask16 m, const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, p)));
}
/// y[row[i]] += w[i] * x for i < n, all rows different. A scatter of sixteen is as fast as sixteen stores.
template <class Value>
SF_INLINE void add_at(float* y, const uint16_t* row, const Value* w, float x, uint32_t n) {
    const __m512 value = _mm512_set1_ps(x);
    uint32_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {  // two gathers before the first scatter: their rows differ
        const __m512i at0 = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i)));
        const __m512i at1 =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i + kLanes)));
        const __m512 old0 = _mm512_i32gather_ps(at0, y, 4), old1 = _mm512_i32gather_ps(at1, y, 4);
        _mm512_i32scatter_ps(y, at0, _mm512_fmadd_ps(load(w + i).v, value, old0), 4);
        _mm512_i32scatter_ps(y, at1, _mm512_fmadd_ps(load(w + i + kLanes).v, value, old1), 4);
    }
    for (; i < n; i += kLanes) {
        const __mmask16 m = static_cast<__mmask16>(n - i >= kLanes ? 0xffff : (1u << (n - i)) - 1);
        const __m512i at = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, row + i));
        const __m512 old = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, at, y, 4);
        _mm512_mask_i32scatter_ps(y, m, at, _mm512_fmadd_ps(load_masked(m, w + i), value, old), 4);
    }
}
/// Sixteen sums of 32 bits; dot4 adds to each the four products of codes in its lane, all of them within +-127.
struct I16 {
    __m512i v;
};
SF_INLINE I16 zero() { return {_mm512_setzero_si512()}; }
SF_INLINE void store(int32_t* p, I16 a) { _mm512_storeu_si512(p, a.v); }
SF_INLINE F16 widen(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
SF_INLINE I16 four_codes(const int8_t* p) {  // the same four in every lane
    int four;
    __builtin_memcpy(&four, p, sizeof four);
    return {_mm512_set1_epi32(four)};
}
SF_INLINE I16 dot4(I16 sum, const int8_t* w, I16 x) {  // |x| * (w with the sign of x): two of them never saturate
    const __m512i values = _mm512_loadu_si512(w);
    const __m512i turned = _mm512_mask_sub_epi8(values, _mm512_movepi8_mask(x.v), _mm512_setzero_si512(), values);
#if defined(__AVX512VNNI__)
    return {_mm512_dpbusd_epi32(sum.v, _mm512_abs_epi8(x.v), turned)};
#else
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(x.v), turned);
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#endif
}
SF_INLINE void store_codes(int8_t* p, uint32_t n, F16 a) {  // integral lanes within +-127
    const __m128i codes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v));
    _mm_mask_storeu_epi8(p, static_cast<__mmask16>((1u << n) - 1), codes);
}
SF_INLINE __m512i load_index(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SF_INLINE __m512i load_index(const uint32_t* p) { return _mm512_loadu_si512(p); }
/// x[at[i]] of `Count` columns, 16, 32 or 64. Up to 32 are put together one by one; of 64, sixteen dwords at a time are
/// gathered for their first bytes, which is slower for fewer.
template <uint32_t Count, class Column>
SF_INLINE I16 gather_codes(const int8_t* x, const Column* at) {
    const auto code = [&](uint32_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(x[at[i]])) << 8 * (i % 4); };
    const auto four = [&](uint32_t i) { return static_cast<int>(code(i) | code(i + 1) | code(i + 2) | code(i + 3)); };
    const auto gathered = [&](uint32_t i) {
        return _mm512_cvtepi32_epi8(_mm512_i32gather_epi32(load_index(at + i), x, 1));
    };
    if constexpr (Count == 64) {
        const __m256i low = _mm256_set_m128i(gathered(16), gathered(0)),
                      high = _mm256_set_m128i(gathered(48), gathered(32));
        return {_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)};
    }
    __m256i codes = _mm256_castsi128_si256(_mm_setr_epi32(four(0), four(4), four(8), four(12)));
    if constexpr (Count == 32)
        codes = _mm256_inserti128_si256(codes, _mm_setr_epi32(four(16), four(20), four(24), four(28)), 1);
    return {_mm512_castsi256_si512(codes)};
}
/// Lane i gets dword i / Height of the k-th part.
template <uint32_t Height>
SF_INLINE I16 pick(I16 codes, uint32_t k) {
    if constexpr (Height == 1) return codes;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i from = _mm512_add_epi32(_mm512_srli_epi32(lanes, __builtin_ctz(Height)),
                                          _mm512_set1_epi32(static_cast<int>(k * (kLanes / Height))));
    return {_mm512_permutexvar_epi32(from, codes.v)};
}
template <uint32_t Height, class Column>
SF_INLINE F16 spread(const float* x, const Column* at) {
    if constexpr (Height == 1) return {_mm512_i32gather_ps(load_index(at), x, 4)};
    __m512 lanes = _mm512_set1_ps(x[at[0]]);  // one broadcast a column, masked: cheaper than a gather from two lanes on
    for (uint32_t c = 1; c < kLanes / Height; ++c)
        lanes =
            _mm512_mask_broadcastss_ps(lanes, static_cast<__mmask16>(0xffffu << c * Height), _mm_load_ss(x + at[c]));
    return {lanes};
}
SF_INLINE void ramp(uint32_t* p, uint32_t first, uint32_t step) {  // p[i] = first + i * step
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_si512(p, _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(step))),
                                            _mm512_set1_epi32(static_cast<int>(first))));
}
/// The lanes of `bits` of a to the front of `value`, and their numbers from `first` on to `index`; returns how many.
/// Both have room for all sixteen.
SF_INLINE uint32_t compress(uint32_t bits, uint32_t first, F16 a, uint32_t* index, float* value) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 m = static_cast<__mmask16>(bits);
    _mm512_mask_compressstoreu_epi32(index, m, _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(first))));
    _mm512_mask_compressstoreu_ps(value, m, a.v);
    return static_cast<uint32_t>(__builtin_popcount(bits));
}

#elif defined(__AVX2__)

constexpr uint32_t kAccumulators = 7, kHiding = 4;
constexpr uint32_t kTileGroups = 4;

struct F16 {
    __m256 a, b;
};
SF_INLINE F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
SF_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SF_INLINE F16 load(const bf16* p) { return {load8(p), load8(p + 8)}; }
SF_INLINE F16 load(const int8_t* p) { return {load8(p), load8(p + 8)}; }
SF_INLINE void store(float* p, F16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
SF_INLINE F16 add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
SF_INLINE F16 sub(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
SF_INLINE F16 mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
SF_INLINE F16 div(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
SF_INLINE F16 sqrt(F16 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
SF_INLINE F16 fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
SF_INLINE F16 min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
SF_INLINE F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
SF_INLINE F16 round(F16 x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
SF_INLINE __m256 scale2_half(__m256 a, __m256 n) {
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(bits));
}
SF_INLINE F16 scale2(F16 x, F16 n) { return {scale2_half(x.a, n.a), scale2_half(x.b, n.b)}; }
SF_INLINE uint32_t not_le(F16 x, F16 y) {
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_NLE_UQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_NLE_UQ));
    return static_cast<uint32_t>(low | high << 8);
}
SF_INLINE uint32_t equal(const uint8_t* p, uint8_t a) {
    const __m128i same =
        _mm_cmpeq_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(static_cast<char>(a)));
    return static_cast<uint32_t>(_mm_movemask_epi8(same));
}
struct I16 {
    __m256i a, b;
};
SF_INLINE I16 zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
SF_INLINE I16 load_dwords(const uint32_t* codes) {
    const __m256i* p = reinterpret_cast<const __m256i*>(codes);
    return {_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)};
}
SF_INLINE void store(int32_t* p, I16 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, x.b);
}
SF_INLINE F16 widen(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
SF_INLINE I16 four_codes(const int8_t* p) {
    int four;
    __builtin_memcpy(&four, p, sizeof four);
    return {_mm256_set1_epi32(four), _mm256_set1_epi32(four)};
}
SF_INLINE __m256i dot4_half(__m256i sum, const int8_t* w, __m256i x) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(values, x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
SF_INLINE I16 dot4(I16 sum, const int8_t* w, I16 x) {
    return {dot4_half(sum.a, w, x.a), dot4_half(sum.b, w + 32, x.b)};
}
SF_INLINE void store_codes(int8_t* p, uint32_t n, F16 x) {
    // Packing works on halves of a register, each by itself: the quarters come 0 2 1 3 and are put in order.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)),
                                                   _MM_SHUFFLE(3, 1, 2, 0));
    const __m128i codes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    if (n == kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
    int8_t all[kLanes];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(all), codes);
    for (uint32_t i = 0; i < n; ++i) p[i] = all[i];
}
SF_INLINE __m256i load_index(const uint16_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SF_INLINE __m256i load_index(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
template <uint32_t Height, class Column>
SF_INLINE F16 spread(const float* x, const Column* at) {
    if constexpr (Height == 16) return set1(x[at[0]]);
    if constexpr (Height == 8) return {_mm256_set1_ps(x[at[0]]), _mm256_set1_ps(x[at[1]])};
    if constexpr (Height == 4)
        return {_mm256_set_m128(_mm_set1_ps(x[at[1]]), _mm_set1_ps(x[at[0]])),
                _mm256_set_m128(_mm_set1_ps(x[at[3]]), _mm_set1_ps(x[at[2]]))};
    if constexpr (Height == 1)
        return {_mm256_i32gather_ps(x, load_index(at), 4), _mm256_i32gather_ps(x, load_index(at + 8), 4)};
    float lanes[kLanes];
    for (uint32_t i = 0; i < kLanes; ++i) lanes[i] = x[at[i / Height]];
    return load(lanes);
}
SF_INLINE __m256 lane_mask(uint32_t bits) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes), lanes));
}
SF_INLINE F16 keep(uint32_t bits, F16 x) {
    return {_mm256_and_ps(lane_mask(bits), x.a), _mm256_and_ps(lane_mask(bits >> 8), x.b)};
}
/// For each byte the numbers of its set bits, in order.
struct SetBits {
    uint8_t of[256][8] = {};
    constexpr SetBits() {
        for (uint32_t byte = 0; byte < 256; ++byte)
            for (uint32_t bit = 0, n = 0; bit < 8; ++bit)
                if (byte >> bit & 1) of[byte][n++] = static_cast<uint8_t>(bit);
    }
};
constexpr SetBits kSetBits;
SF_INLINE uint32_t compress_half(uint32_t bits, uint32_t first, __m256 a, uint32_t* index, float* value) {
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetBits.of[bits])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(index),
                        _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(first))));
    _mm256_storeu_ps(value, _mm256_permutevar8x32_ps(a, lanes));
    return static_cast<uint32_t>(__builtin_popcount(bits));
}
SF_INLINE uint32_t compress(uint32_t bits, uint32_t first, F16 x, uint32_t* index, float* value) {
    const uint32_t n = compress_half(bits & 0xff, first, x.a, index, value);
    return n + compress_half(bits >> 8, first + 8, x.b, index + n, value + n);
}

#elif defined(SPARSEFOLD_NEON)

constexpr uint32_t kAccumulators = 4, kHiding = 4;  // sixteen of the 32 registers; four pipes of latency four stay busy
constexpr uint32_t kTileGroups = 4;

struct F16 {
    float32x4_t a, b, c, d;
};
SF_INLINE float32x4_t load4(const float* p) { return vld1q_f32(p); }
SF_INLINE float32x4_t load4(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
SF_INLINE float32x4_t load4(const int8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
}
#define SF_EACH1(f) {f(x.a), f(x.b), f(x.c), f(x.d)}
#define SF_EACH2(f) {f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)}
SF_INLINE F16 set1(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return {v, v, v, v};
}
SF_INLINE F16 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
SF_INLINE F16 load(const bf16* p) {
    const uint16x8_t low = vld1q_u16(&p->bits), high = vld1q_u16(&p[8].bits);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(low), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(low, 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(high), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(high, 16))};
}
SF_INLINE F16 load(const int8_t* p) {
    const int8x16_t bytes = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))};
}
SF_INLINE void store(float* p, F16 x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}
SF_INLINE F16 add(F16 x, F16 y) { return SF_EACH2(vaddq_f32); }
SF_INLINE F16 sub(F16 x, F16 y) { return SF_EACH2(vsubq_f32); }
SF_INLINE F16 mul(F16 x, F16 y) { return SF_EACH2(vmulq_f32); }
SF_INLINE F16 div(F16 x, F16 y) { return SF_EACH2(vdivq_f32); }
SF_INLINE F16 sqrt(F16 x) { return SF_EACH1(vsqrtq_f32); }
SF_INLINE F16 fma(F16 x, F16 y, F16 z) {
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}
SF_INLINE F16 min(F16 x, F16 y) { return SF_EACH2(vminq_f32); }  // NaN in either wins
SF_INLINE F16 max(F16 x, F16 y) { return SF_EACH2(vmaxq_f32); }
SF_INLINE F16 round(F16 x) { return SF_EACH1(vrndnq_f32); }
SF_INLINE float32x4_t scale2_quarter(float32x4_t a, float32x4_t n) {  // NaN becomes the integer 0; `a` carries it on
    const int32x4_t bits = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(a, vreinterpretq_f32_s32(bits));
}
SF_INLINE F16 scale2(F16 x, F16 y) { return SF_EACH2(scale2_quarter); }

/// All bits of a lane, or none: what a comparison leaves in the registers, which cost nothing to use there.
struct Lanes {
    uint32x4_t a, b, c, d;
};
SF_INLINE float32x4_t keep_quarter(uint32x4_t lanes, float32x4_t x) {
    return vreinterpretq_f32_u32(vandq_u32(lanes, vreinterpretq_u32_f32(x)));
}
SF_INLINE F16 keep(Lanes x, F16 y) { return SF_EACH2(keep_quarter); }
SF_INLINE F16 add_where(F16 x, Lanes lanes, F16 z) { return add(x, keep(lanes, z)); }
SF_INLINE Lanes equal(const uint8_t* p, uint8_t value) {
    // Bytes widened before they are compared: the compiler does that once for all the values that one place is asked
    // for.
    const uint8x16_t bytes = vld1q_u8(p);
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
    const uint32x4_t wanted = vdupq_n_u32(value);
    return {vceqq_u32(vmovl_u16(vget_low_u16(low)), wanted), vceqq_u32(vmovl_high_u16(low), wanted),
            vceqq_u32(vmovl_u16(vget_low_u16(high)), wanted), vceqq_u32(vmovl_high_u16(high), wanted)};
}
SF_INLINE Lanes lanes_of(uint32_t bits) {
    const uint32x4_t first = {1, 2, 4, 8}, all = vdupq_n_u32(bits);
    return {vtstq_u32(all, first), vtstq_u32(all, vshlq_n_u32(first, 4)), vtstq_u32(all, vshlq_n_u32(first, 8)),
            vtstq_u32(all, vshlq_n_u32(first, 12))};
}
SF_INLINE F16 keep(uint32_t bits, F16 x) { return keep(lanes_of(bits), x); }
SF_INLINE uint32_t not_le(F16 x, F16 y) {
    const Lanes le = SF_EACH2(vcleq_f32);
    const uint16x8_t low = vcombine_u16(vmovn_u32(le.a), vmovn_u32(le.b));
    const uint16x8_t high = vcombine_u16(vmovn_u32(le.c), vmovn_u32(le.d));
    const uint8x16_t weights = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t bits = vbicq_u8(weights, vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
    return vaddv_u8(vget_low_u8(bits)) | static_cast<uint32_t>(vaddv_u8(vget_high_u8(bits))) << 8;
}
struct I16 {
    int32x4_t a, b, c, d;
};
SF_INLINE I16 zero() { return {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}; }
SF_INLINE void store(int32_t* p, I16 x) {
    vst1q_s32(p, x.a);
    vst1q_s32(p + 4, x.b);
    vst1q_s32(p + 8, x.c);
    vst1q_s32(p + 12, x.d);
}
SF_INLINE F16 widen(I16 x) { return SF_EACH1(vcvtq_f32_s32); }
SF_INLINE I16 four_codes(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    const int32x4_t v = vdupq_n_s32(four);
    return {v, v, v, v};
}
SF_INLINE int32x4_t dot4_quarter(int32x4_t sum, const int8_t* w, int32x4_t x) {  // two products fit 16 bits
    const int8x16_t codes = vld1q_s8(w), others = vreinterpretq_s8_s32(x);
    const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(others)), high = vmull_high_s8(codes, others);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
}
SF_INLINE I16 dot4(I16 sum, const int8_t* w, I16 x) {
    return {dot4_quarter(sum.a, w, x.a), dot4_quarter(sum.b, w + 16, x.b), dot4_quarter(sum.c, w + 32, x.c),
            dot4_quarter(sum.d, w + 48, x.d)};
}
SF_INLINE I16 load_dwords(const uint32_t* codes) {
    const int32_t* p = reinterpret_cast<const int32_t*>(codes);
    return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)};
}
template <uint32_t Height, class Column>
SF_INLINE float32x4_t spread_quarter(const float* x, const Column* at) {
    if constexpr (Height >= 4) return vld1q_dup_f32(x + at[0]);
    if constexpr (Height == 2) return vcombine_f32(vld1_dup_f32(x + at[0]), vld1_dup_f32(x + at[1]));
    return float32x4_t{x[at[0]], x[at[1]], x[at[2]], x[at[3]]};
}
template <uint32_t Height, class Column>
SF_INLINE F16 spread(const float* x, const Column* at) {
    if constexpr (Height == 16) return set1(x[at[0]]);
    return {spread_quarter<Height>(x, at), spread_quarter<Height>(x, at + 4 / Height),
            spread_quarter<Height>(x, at + 8 / Height), spread_quarter<Height>(x, at + 12 / Height)};
}
#undef SF_EACH1
#undef SF_EACH2

#else

constexpr uint32_t kAccumulators = 2, kHiding = 2;
constexpr uint32_t kTileGroups = 2;

struct F16 {
    float v[kLanes];
};
#define SF_LANES(expression)                                       \
    F16 out;                                                       \
    for (uint32_t i = 0; i < kLanes; ++i) out.v[i] = (expression); \
    return out
SF_INLINE F16 set1(float a) { SF_LANES(a); }
SF_INLINE F16 load(const float* p) { SF_LANES(p[i]); }
SF_INLINE F16 load(const bf16* p) { SF_LANES(widen(p[i])); }
SF_INLINE F16 load(const int8_t* p) { SF_LANES(widen(p[i])); }
SF_INLINE void store(float* p, const F16& a) {
    for (uint32_t i = 0; i < kLanes; ++i) p[i] = a.v[i];
}
SF_INLINE F16 add(const F16& a, const F16& b) { SF_LANES(a.v[i] + b.v[i]); }
SF_INLINE F16 sub(const F16& a, const F16& b) { SF_LANES(a.v[i] - b.v[i]); }
SF_INLINE F16 mul(const F16& a, const F16& b) { SF_LANES(a.v[i] * b.v[i]); }
SF_INLINE F16 div(const F16& a, const F16& b) { SF_LANES(a.v[i] / b.v[i]); }
SF_INLINE F16 sqrt(const F16& a) { SF_LANES(__builtin_sqrtf(a.v[i])); }
SF_INLINE F16 fma(const F16& a, const F16& b, const F16& c) { SF_LANES(a.v[i] * b.v[i] + c.v[i]); }
SF_INLINE F16 min(const F16& a, const F16& b) { SF_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
SF_INLINE F16 max(const F16& a, const F16& b) { SF_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
// Adding and taking away 1.5 * 2^23 leaves the nearest integer for |a| < 2^22.
SF_INLINE F16 round(const F16& a) { SF_LANES((a.v[i] + 12582912.0f) - 12582912.0f); }
SF_INLINE F16 scale2(const F16& a, const F16& n) {
    F16 out;
    for (uint32_t i = 0; i < kLanes; ++i) {
        const float finite = n.v[i] == n.v[i] ? n.v[i] : 0.0f;  // NaN to int is undefined; `a` carries the NaN on
        const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(finite) + 127) << 23;
        float factor;
        __builtin_memcpy(&factor, &bits, sizeof factor);
        out.v[i] = a.v[i] * factor;
    }
    return out;
}
SF_INLINE uint32_t not_le(const F16& a, const F16& b) {
    uint32_t bits = 0;
    for (uint32_t i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(!(a.v[i] <= b.v[i])) << i;
    return bits;
}
SF_INLINE F16 keep(uint32_t bits, const F16& a) { SF_LANES((bits >> i & 1) ? a.v[i] : 0.0f); }
struct I16 {
    int32_t v[kLanes];
};
SF_INLINE I16 zero() { return {}; }
SF_INLINE I16 load_dwords(const uint32_t* codes) {
    I16 out;
    __builtin_memcpy(&out, codes, sizeof out);
    return out;
}
SF_INLINE void store(int32_t* p, const I16& a) { __builtin_memcpy(p, &a, sizeof a); }
SF_INLINE F16 widen(const I16& a) { SF_LANES(static_cast<float>(a.v[i])); }
SF_INLINE I16 four_codes(const int8_t* p) {
    I16 out;
    for (uint32_t i = 0; i < kLanes; ++i) __builtin_memcpy(&out.v[i], p, sizeof out.v[i]);
    return out;
}
SF_INLINE I16 dot4(const I16& sum, const int8_t* w, const I16& x) {
    int8_t codes[4 * kLanes];
    __builtin_memcpy(codes, &x, sizeof codes);
    I16 out = sum;
    for (uint32_t i = 0; i < 4 * kLanes; ++i) out.v[i / 4] += w[i] * codes[i];
    return out;
}
/// Lane i gets x[at[i / Height]].
template <uint32_t Height, class Column>
SF_INLINE F16 spread(const float* x, const Column* at) {
    SF_LANES(x[at[i / Height]]);
}
#undef SF_LANES

#endif

/// y[0 .. Height) += w * x; whole vectors, and the heights that have a vector of their own.
template <uint32_t Height, class Value>
SF_INLINE void axpy(float* y, const Value* w, float x) {
    if constexpr (Height == kLanes) return store(y, fma(load(w), set1(x), load(y)));
#if defined(__AVX2__) || defined(__AVX512F__)
    if constexpr (Height == 8) return _mm256_storeu_ps(y, _mm256_fmadd_ps(load8(w), _mm256_set1_ps(x), load8(y)));
    if constexpr (Height == 4) return _mm_storeu_ps(y, _mm_fmadd_ps(load4(w), _mm_set1_ps(x), load4(y)));
#elif defined(SPARSEFOLD_NEON)
    if constexpr (Height == 8) {
        const float32x4_t low = vfmaq_n_f32(load4(y), load4(w), x), high = vfmaq_n_f32(load4(y + 4), load4(w + 4), x);
        vst1q_f32(y, low);
        return vst1q_f32(y + 4, high);
    }
    if constexpr (Height == 4) return vst1q_f32(y, vfmaq_n_f32(load4(y), load4(w), x));
#endif
    for (uint32_t i = 0; i < Height; ++i) y[i] += widen(w[i]) * x;
}

/// The codes x[i] of the set bits i, in order and raised by 128, to the front of `to`, of which 64 bytes are written;
/// the products of the same four such codes with each lane's four weights; and four sums less what raising added.
#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
constexpr bool kPicksCodes = true;
SF_INLINE uint32_t pick_codes(uint8_t* to, const int8_t* x, uint64_t bits) {
    const __m512i raised = _mm512_xor_si512(_mm512_loadu_si512(x), _mm512_set1_epi8(-128));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi8(bits, raised));
    return static_cast<uint32_t>(__builtin_popcountll(bits));
}
SF_INLINE I16 dot4_raised(I16 sum, const int8_t* w, const uint8_t* codes) {
    int four;
    __builtin_memcpy(&four, codes, sizeof four);
    return {_mm512_dpbusd_epi32(sum.v, _mm512_set1_epi32(four), _mm512_loadu_si512(w))};
}
SF_INLINE F16 lowered(I16 a, I16 b, I16 c, I16 d, const int32_t* added) {
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(a.v, b.v), _mm512_add_epi32(c.v, d.v));
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_loadu_si512(added)))};
}
#else
constexpr bool kPicksCodes = false;  // one by one is no faster than by column number
SF_INLINE uint32_t pick_codes(uint8_t*, const int8_t*, uint64_t) { return 0; }
SF_INLINE I16 dot4_raised(I16 sum, const int8_t*, const uint8_t*) { return sum; }
SF_INLINE F16 lowered(const I16&, const I16&, const I16&, const I16&, const int32_t*) { return set1(0.0f); }
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
/// Codes stay in memory: from there a dword is spread over a vector while it is loaded.
template <uint32_t Count>
struct Gathered {
    int32_t four[Count / 4];
};
template <uint32_t Count, class Column>
SF_INLINE Gathered<Count> gather_codes(const int8_t* x, const Column* at) {
    const auto code = [&](uint32_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(x[at[i]])) << 8 * (i % 4); };
    Gathered<Count> out;
    for (uint32_t i = 0; i < Count; i += 4)
        out.four[i / 4] = static_cast<int32_t>(code(i) | code(i + 1) | code(i + 2) | code(i + 3));
    return out;
}
template <uint32_t Height, uint32_t Count>
SF_INLINE I16 pick(const Gathered<Count>& codes, uint32_t k) {
    const int32_t* p = codes.four + k * (kLanes / Height);
    if constexpr (Height == 16) return {_mm256_set1_epi32(p[0]), _mm256_set1_epi32(p[0])};
    if constexpr (Height == 8) return {_mm256_set1_epi32(p[0]), _mm256_set1_epi32(p[1])};
    if constexpr (Height == 4)
        return {_mm256_set_m128i(_mm_set1_epi32(p[1]), _mm_set1_epi32(p[0])),
                _mm256_set_m128i(_mm_set1_epi32(p[3]), _mm_set1_epi32(p[2]))};
    if constexpr (Height == 2) {
        const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm256_permutevar8x32_epi32(eight, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
                _mm256_permutevar8x32_epi32(eight, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
    }
    return load_dwords(reinterpret_cast<const uint32_t*>(p));
}
#elif !defined(__AVX512F__)
template <uint32_t Count, class Column>
SF_INLINE I16 gather_codes(const int8_t* x, const Column* at) {
    alignas(64) int8_t codes[4 * kLanes];
    for (uint32_t i = 0; i < Count; ++i) codes[i] = x[at[i]];
    return load_dwords(reinterpret_cast<const uint32_t*>(codes));
}
template <uint32_t Height>
SF_INLINE I16 pick(const I16& codes, uint32_t k) {
    if constexpr (Height == 1) return codes;
    uint32_t all[kLanes], lanes[kLanes];
    __builtin_memcpy(all, &codes, sizeof all);
    for (uint32_t i = 0; i < kLanes; ++i) lanes[i] = all[i / Height + k * (kLanes / Height)];
    return load_dwords(lanes);
}
#endif

#if !defined(__AVX512F__)
SF_INLINE F16 add_where(const F16& a, uint32_t bits, const F16& b) { return add(a, keep(bits, b)); }
#if !defined(__AVX2__) && !defined(SPARSEFOLD_NEON)
SF_INLINE uint32_t equal(const uint8_t* p, uint8_t a) {
    uint32_t bits = 0;
    for (uint32_t i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(p[i] == a) << i;
    return bits;
}
#endif
SF_INLINE F16 load_first(const float* p, uint32_t n) {
    float lanes[kLanes] = {};
    for (uint32_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
}
SF_INLINE void store_first(float* p, uint32_t n, const F16& a) {
    float lanes[kLanes];
    store(lanes, a);
    for (uint32_t i = 0; i < n; ++i) p[i] = lanes[i];
}
#if !defined(__AVX2__)
SF_INLINE void store_codes(int8_t* p, uint32_t n, const F16& a) {  // integral lanes within +-127
    float lanes[kLanes];
    store(lanes, a);
    for (uint32_t i = 0; i < n; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}
#endif
SF_INLINE void ramp(uint32_t* p, uint32_t first, uint32_t step) {
    for (uint32_t i = 0; i < kLanes; ++i) p[i] = first + i * step;
}
#if !defined(__AVX2__)
SF_INLINE uint32_t compress(uint32_t bits, uint32_t first, const F16& a, uint32_t* index, float* value) {
    float lanes[kLanes];
    store(lanes, a);
    uint32_t n = 0;
    for (; bits; bits &= bits - 1, ++n) {
        const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(bits));
        index[n] = first + lane;
        value[n] = lanes[lane];
    }
    return n;
}
#endif
#endif

/// y[row[i]] += w[i] * x for i < n, all rows different: four sums are under way before the first is stored.
template <class Row, class Value>
SF_INLINE void add_at(float* y, const Row* row, const Value* w, float x, uint32_t n) {
    uint32_t i = 0;
    for (; i + 4 <= n; i += 4) {
        float sum[4];
        for (uint32_t k = 0; k < 4; ++k) sum[k] = y[row[i + k]] + widen(w[i + k]) * x;
        for (uint32_t k = 0; k < 4; ++k) y[row[i + k]] = sum[k];
    }
    for (; i < n; ++i) y[row[i]] += widen(w[i]) * x;
}

/// Sum of all lanes.
SF_INLINE float sum(const F16& a) {
    float lanes[kLanes];
    store(lanes, a);
    for (uint32_t half = kLanes / 2; half; half /= 2)
        for (uint32_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

/// out[0 .. 4) += the sum of all lanes of each of four vectors.
SF_INLINE void add_sums(float* out, const F16& a, const F16& b, const F16& c, const F16& d) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));  // a b a b, four times
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), four));
#elif defined(__AVX2__)
    const __m256 wa = _mm256_add_ps(a.a, a.b), wb = _mm256_add_ps(b.a, b.b);
    const __m256 wc = _mm256_add_ps(c.a, c.b), wd = _mm256_add_ps(d.a, d.b);
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(wa, wb), _mm256_hadd_ps(wc, wd));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), four));
#else
    out[0] += sum(a), out[1] += sum(b), out[2] += sum(c), out[3] += sum(d);
#endif
}

/// exp(x) for |x| <= 87, relative error below 2e-7: 2^n times a degree-6 Taylor polynomial on |r| <= ln(2)/2, evaluated
/// by Horner's rule, with ln(2) split in two (Cody and Waite) so that the reduction is exact. NaN passes through.
SF_INLINE F16 exp(F16 x) {
    const F16 n = round(mul(x, set1(1.44269504088896341f)));
    F16 r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    F16 p = set1(1.0f / 720);
    p = fma(p, r, set1(1.0f / 120));
    p = fma(p, r, set1(1.0f / 24));
    p = fma(p, r, set1(1.0f / 6));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return scale2(p, n);
}

/// 1 / (1 + exp(-x)), absolute error at most 1.1e-7 (tests/tolerances.py).
SF_INLINE F16 sigmoid(F16 x) {
    const F16 bounded = max(set1(-87.0f), min(set1(87.0f), x));
    return div(set1(1.0f), add(set1(1.0f), exp(sub(set1(0.0f), bounded))));
}

/// 2 sigmoid(2x) - 1, absolute error at most 2.2e-7.
SF_INLINE F16 tanh(F16 x) { return fma(set1(2.0f), sigmoid(add(x, x)), set1(-1.0f)); }

}  // namespace SPARSEFOLD_ISA
}  // namespace sparsefold
