// Kernels of the attention on a CPU; `kernels_torch.py` defines them. Each token is read once, and the keys are the
// only tensor of a tile's size that is written.
//
// Vectors are extensions of GCC and Clang, which map them to the processor's registers. Threads share the work by
// frame and by range of channels. A range is summed in the order of positions, so the number of threads changes no bit.

#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16, RANGE = 256;  // channels of a vector, and of one work item
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct Float { uint32_t bits; };
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline Vector widen(const Float* from) { Vector v; std::memcpy(&v, from, sizeof v); return v; }

inline Vector widen(const BFloat16* from) {
    Halves half;
    std::memcpy(&half, from, sizeof half);
    return (Vector)(__builtin_convertvector(half, Integers) << 16);
}

inline Vector widen(const Float16* from) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
    Vector v;
    for (int half = 0; half < 2; ++half) {
        const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from + half));
        std::memcpy((char*)&v + 32 * half, &part, sizeof part);
    }
    return v;
#else
    Vector v;
    for (int lane = 0; lane < LANES; ++lane) {
        _Float16 value;
        std::memcpy(&value, from + lane, sizeof value);
        v[lane] = (float)value;
    }
    return v;
#endif
}

inline void narrow(Vector v, Float* to) { std::memcpy(to, &v, sizeof v); }

inline void narrow(Vector v, BFloat16* to) {  // to the nearest, ties to even
#if defined(__AVX512BF16__)
    const Halves half = (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    const Integers bits = (Integers)v;
    const Integers rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Halves half = __builtin_convertvector((v != v ? bits | 0x400000 : rounded) >> 16 & 0xffff, Halves);
#endif
    std::memcpy(to, &half, sizeof half);
}

// The last channels of a row may not fill a vector; they are then copied through a padded one.
template <typename Type>
inline Vector load(const Type* from, int count) {
    if (count >= LANES) return widen(from);
    Type padded[LANES] = {};
    std::memcpy(padded, from, count * sizeof(Type));
    return widen(padded);
}

template <typename Type>
inline void store(Vector v, Type* to, int count) {
    if (count >= LANES) return narrow(v, to);
    Type padded[LANES];
    narrow(v, padded);
    std::memcpy(to, padded, count * sizeof(Type));
}

inline Vector load(const float* from, int count) { return load((const Float*)from, count); }
inline void store(Vector v, float* to, int count) { store(v, (Float*)to, count); }

// e^x for |x| < 87: x = n·ln 2 + r, a polynomial in r, and n into the exponent. Within 2 units in the last place.
inline Vector exponential(Vector x) {
    const float shift = 12582912.f;  // 1.5·2²³: adding it rounds to an integer, in the low bits
    const Vector shifted = x * 1.44269504f + shift;
    const Vector n = shifted - shift;
    const Vector r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vector y = r * 1.3888889e-3f + 8.3333333e-3f;
    y = y * r + 4.1666667e-2f;
    y = y * r + 1.6666667e-1f;
    y = y * r + 0.5f;
    y = y * r + 1.f;
    y = y * r + 1.f;
    return (Vector)((Integers)y + ((Integers)shifted << 23));
}

inline Vector hyperbolic_tangent(Vector x) {
    const Integers sign = (Integers)x & INT32_MIN;
    const Vector size = (Vector)((Integers)x & INT32_MAX);
    const Vector e = exponential((size > 20.f ? (Vector)(size * 0.f + 20.f) : size) * -2.f);
    return (Vector)((Integers)((1.f - e) / (1.f + e)) | sign);
}

// Sums of one work item, a frame and a range of channels; small enough for the first-level cache.
struct Row { float values[RANGE]; };

inline void add(Row& row, int c, Vector v) {
    Vector sum;
    std::memcpy(&sum, row.values + c, sizeof sum);
    sum += v;
    std::memcpy(row.values + c, &sum, sizeof sum);
}

struct Shape { int64_t clips, frames, positions, dim; };

// Calls work(clip, first token, index of the frame's first sum, first channel, channels) for each work item.
template <typename Work>
void for_each_item(const Shape& shape, Work work) {
    const int64_t ranges = (shape.dim + RANGE - 1) / RANGE, rows = shape.clips * shape.frames;
#pragma omp parallel for schedule(static)
    for (int64_t item = 0; item < rows * ranges; ++item) {
        const int64_t row = item / ranges, first = item % ranges * RANGE;
        const int64_t left = shape.dim - first;
        work(row / shape.frames, row * shape.positions, row * shape.dim + first, first, int(left < RANGE ? left : RANGE));
    }
}

template <int COUNT>
void write_sums(const Row* rows, float* sums, int64_t stride, int64_t at, int channels) {
    for (int number = 0; number < COUNT; ++number)
        std::memcpy(sums + number * stride + at, rows[number].values, channels * sizeof(float));
}

template <typename Key, typename Token, bool MOMENTS>
void attend(Key* keys, const float* bias, const Token* tokens, const float* guide, float* sums, const Shape& shape, bool store_keys) {
    constexpr int COUNT = MOMENTS ? 5 : 3;
    const int64_t dim = shape.dim, stride = shape.clips * shape.frames * dim;
    for_each_item(shape, [=](int64_t clip, int64_t token, int64_t at, int64_t first, int channels) {
        alignas(64) Row rows[COUNT] = {};
        const float* a = guide + clip * dim + first;
        for (int64_t s = 0; s < shape.positions; ++s) {
            Key* key = keys + (token + s) * dim + first;
            const Token* value = tokens + (token + s) * dim + first;
            for (int c = 0; c < channels; c += LANES) {
                const int count = channels - c;
                Vector p = hyperbolic_tangent(load(key + c, count) + load(bias + first + c, count));
                if (sizeof(Key) < sizeof(float) || store_keys) {  // sums use the keys as they are stored
                    alignas(64) Key rounded[LANES];
                    narrow(p, rounded);
                    p = widen(rounded);
                    if (store_keys) store(p, key + c, count);
                }
                const Vector e = exponential(p * load(a + c, count)), v = load(value + c, count);
                const Vector ep = e * p, ev = e * v;
                add(rows[0], c, e);
                add(rows[1], c, ep);
                add(rows[2], c, ev);
                if (MOMENTS) {
                    add(rows[COUNT - 2], c, ep * p);
                    add(rows[COUNT - 1], c, ev * p);
                }
            }
        }
        write_sums<COUNT>(rows, sums, stride, at, channels);
    });
}

template <typename Key>
void compare(Key* keys, const float* bias, const float* guide, const Key* student, float* sums, const Shape& shape, bool store_keys) {
    const int64_t dim = shape.dim, stride = shape.clips * shape.frames * dim;
    for_each_item(shape, [=](int64_t clip, int64_t token, int64_t at, int64_t first, int channels) {
        alignas(64) Row rows[3] = {};
        const float* a = guide + clip * dim + first;
        for (int64_t s = 0; s < shape.positions; ++s) {
            Key* key = keys + (token + s) * dim + first;
            const Key* other = student + (token + s) * dim + first;
            for (int c = 0; c < channels; c += LANES) {
                const int count = channels - c;
                alignas(64) Key rounded[LANES];
                narrow(hyperbolic_tangent(load(key + c, count) + load(bias + first + c, count)), rounded);
                const Vector p = widen(rounded), e = exponential(p * load(a + c, count));
                if (store_keys) store(p, key + c, count);
                add(rows[0], c, e);
                add(rows[1], c, e * p);
                add(rows[2], c, e * load(other + c, count));
            }
        }
        write_sums<3>(rows, sums, stride, at, channels);
    });
}

// `sums` (clips, frames, dim) are the sums of the gradient over positions.
template <typename Key, typename Token, bool HAS_TEACHER>
void differentiate(const Key* keys, const Token* tokens, const float* guide, const float* factors,
                   const Key* teacher_keys, const float* teacher_guide, const float* teacher_factor,
                   Key* out, float* sums, const Shape& shape) {
    const int64_t dim = shape.dim, stride = shape.clips * shape.frames * dim;
    for_each_item(shape, [=](int64_t clip, int64_t token, int64_t at, int64_t first, int channels) {
        alignas(64) Row row = {};
        const float* a = guide + clip * dim + first;
        const float* f = factors + at;
        for (int64_t s = 0; s < shape.positions; ++s) {
            const int64_t here = (token + s) * dim + first;
            for (int c = 0; c < channels; c += LANES) {
                const int count = channels - c;
                const Vector p = load(keys + here + c, count), v = load(tokens + here + c, count);
                const Vector inner = load(f + c, count) + load(f + stride + c, count) * p + load(f + 2 * stride + c, count) * v;
                Vector gradient = exponential(p * load(a + c, count)) * inner;
                if (HAS_TEACHER) {
                    const Vector score = load(teacher_keys + here + c, count) * load(teacher_guide + clip * dim + first + c, count);
                    gradient -= exponential(score) * load(teacher_factor + at + c, count);
                }
                gradient *= 1.f - p * p;
                store(gradient, out + here + c, count);
                add(row, c, gradient);
            }
        }
        std::memcpy(sums + at, row.values, channels * sizeof(float));
    });
}

template <typename From, typename To>
void convert(const From* from, To* to, int64_t count) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < count; first += RANGE)
        for (int64_t at = first; at < first + RANGE && at < count; at += LANES) {
            const int left = count - at < LANES ? int(count - at) : LANES;
            store(load(from + at, left), to + at, left);
        }
}

template <typename Key, typename Token>
void attend_with(Key* keys, const float* bias, const Token* tokens, const float* guide, float* sums,
                   const Shape& shape, bool store_keys, bool moments) {
    if (moments) attend<Key, Token, true>(keys, bias, tokens, guide, sums, shape, store_keys);
    else attend<Key, Token, false>(keys, bias, tokens, guide, sums, shape, store_keys);
}

}  // namespace

#define KERNELS(KEY, TOKEN)                                                                                   \
    extern "C" void attend_##KEY##_##TOKEN(void* keys, const float* bias, const void* tokens,                 \
                                           const float* guide, float* sums, const Shape* shape, int store_keys,\
                                           int moments) {                                                     \
        attend_with((KEY*)keys, bias, (const TOKEN*)tokens, guide, sums, *shape, store_keys, moments);        \
    }                                                                                                         \
    extern "C" void differentiate_##KEY##_##TOKEN(                                                            \
        const void* keys, const void* tokens, const float* guide, const float* factors,                       \
        const void* teacher_keys, const float* teacher_guide, const float* teacher_factor, void* out, float* sums,\
        const Shape* shape) {                                                                                 \
        const auto run = teacher_keys ? differentiate<KEY, TOKEN, true> : differentiate<KEY, TOKEN, false>;   \
        run((const KEY*)keys, (const TOKEN*)tokens, guide, factors, (const KEY*)teacher_keys, teacher_guide,  \
            teacher_factor, (KEY*)out, sums, *shape);                                                         \
    }
#define COMPARE_KERNEL(KEY)                                                                                   \
    extern "C" void compare_##KEY(void* keys, const float* bias, const float* guide, const void* student,     \
                                  float* sums, const Shape* shape, int store_keys) {                          \
        compare((KEY*)keys, bias, guide, (const KEY*)student, sums, *shape, store_keys);                      \
    }

KERNELS(Float, Float)
KERNELS(Float, BFloat16)
KERNELS(Float, Float16)
KERNELS(BFloat16, Float)
KERNELS(BFloat16, BFloat16)
KERNELS(BFloat16, Float16)
COMPARE_KERNEL(Float)
COMPARE_KERNEL(BFloat16)

extern "C" void convert_Float16_BFloat16(const void* from, void* to, int64_t count) {
    convert((const Float16*)from, (BFloat16*)to, count);
}
