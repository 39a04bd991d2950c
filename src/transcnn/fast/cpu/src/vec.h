// Vectors of floats that fill a register, loads and stores as fp32 or bf16, exp and SiLU; scratch memory of a thread.
//
// Compilers keep longer vectors than registers in memory, so these have as many lanes as the CPU's: sixteen with AVX-512, eight
// with AVX2, else four. Channels are multiples of sixteen everywhere.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if defined(__AVX512F__)
constexpr long LANES = 16;
#elif defined(__AVX2__)
constexpr long LANES = 8;
#else
constexpr long LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bf16 {
    uint16_t bits;
};

template <class To, class From>
inline To as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline Vec all(float x) { return x - Vec{}; }  // minus, for -0 plus 0 is 0

inline Vec load(const float* p) {
    Vec x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline Bits bits(const bf16* p) {
    Halves x;
    std::memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, Bits);
}

inline Vec load(const bf16* p) { return as<Vec>(bits(p) << 16); }

inline float number(float x) { return x; }
inline float number(bf16 x) { return as<float>(int32_t(x.bits) << 16); }

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

// Rounds to nearest even; NaN stays NaN.
inline Halves rounded(Vec x) {
#ifdef __AVX512BF16__
    return as<Halves>(_mm512_cvtneps_pbh(as<__m512>(x)));
#else
    Bits bits = as<Bits>(x);
    Bits nearest = bits + 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector((x == x ? nearest : bits | 0x400000) >> 16, Halves);
#endif
}

inline void store(bf16* p, Vec x) {
    Halves halves = rounded(x);
    std::memcpy(p, &halves, sizeof halves);
}

// The same of the first n alone; zeros in place of the others.
template <class T>
inline Vec load_some(const T* p, long n) {
    if (n >= LANES) return load(p);
    T some[LANES] = {};
    if (n == LANES / 2)
        std::memcpy(some, p, LANES / 2 * sizeof(T));  // which is one instruction
    else
        std::memcpy(some, p, n * sizeof(T));
    return load(some);
}

template <class T>
inline void store_some(T* p, Vec x, long n) {
    if (n >= LANES) return store(p, x);
    T some[LANES];
    store(some, x);
    if (n == LANES / 2)
        std::memcpy(p, some, LANES / 2 * sizeof(T));
    else
        std::memcpy(p, some, n * sizeof(T));
}

// x > y ? x : y and x < y ? x : y: y where either is NaN. GCC 12 compiles the latter forms to a comparison and a blend.
inline Vec larger(Vec x, Vec y) {
#if defined(__AVX512F__)
    return as<Vec>(_mm512_max_ps(as<__m512>(x), as<__m512>(y)));
#elif defined(__AVX2__)
    return as<Vec>(_mm256_max_ps(as<__m256>(x), as<__m256>(y)));
#else
    return x > y ? x : y;
#endif
}

inline Vec smaller(Vec x, Vec y) {
#if defined(__AVX512F__)
    return as<Vec>(_mm512_min_ps(as<__m512>(x), as<__m512>(y)));
#elif defined(__AVX2__)
    return as<Vec>(_mm256_min_ps(as<__m256>(x), as<__m256>(y)));
#else
    return x < y ? x : y;
#endif
}

// Splits x, clamped to [-87, 88], into n·ln 2 + r. Adding and subtracting ``shift`` rounds n; the result, n + shift, has n in
// its lowest bits.
inline Vec split(Vec x, float shift, Vec& r) {
    x = larger(all(-87.0f), smaller(all(88.0f), x));
    Vec shifted = x * 1.44269504f + shift;
    Vec n = shifted - shift;
    r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    return shifted;
}

// eˣ on [-87, 88] and constant beyond, within 2 ulp in fp32 or, where T is bf16, with a relative error of 2e-6.
#if defined(__AVX512F__)

// x = (n + j/16)·ln 2 + r with |r| below 0.022: eˣ = 2ⁿ·2^(j/16)·eʳ, and the sixteen values of 2^(j/16) fit one register.
template <class T>
inline Vec exponential(Vec x) {
    const Vec sixteenths = {1.0f, 1.0442737824f, 1.0905077327f, 1.1387886348f, 1.1892071150f, 1.2418578121f,
                            1.2968395547f, 1.3542555469f, 1.4142135624f, 1.4768261459f, 1.5422108254f, 1.6104903320f,
                            1.6817928305f, 1.7562521604f, 1.8340080864f, 1.9152065614f};
    Vec r, shifted = split(x, 786432.0f, r);  // 1.5·2¹⁹: rounds to sixteenths
    Vec p = sizeof(T) == 2 ? r * 0.5f + 1.0f : (r * 0.16666667f + 0.5f) * r + 1.0f;
    __m512i places = as<__m512i>(shifted);
    Vec base = as<Vec>(_mm512_permutexvar_ps(places, as<__m512>(sixteenths)));
    p = (base * r) * p + base;
    return as<Vec>(as<Bits>(p) + ((as<Bits>(shifted) >> 4) << 23));
}

inline Vec inverse(Vec x) {
    Vec y = as<Vec>(_mm512_rcp14_ps(as<__m512>(x)));
    return y * (2.0f - x * y);
}

#else

// x = n·ln 2 + r with |r| below 0.35: eˣ = 2ⁿ·eʳ.
template <class T>
inline Vec exponential(Vec x) {
    Vec r, shifted = split(x, 12582912.0f, r);  // 1.5·2²³: rounds to integers
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return as<Vec>(as<Bits>(p) + (as<Bits>(shifted) << 23));
}

inline Vec inverse(Vec x) { return 1.0f / x; }

#endif

template <class T>
inline Vec silu(Vec x) {
    return x * inverse(exponential<T>(-x) + 1.0f);
}

// The lanes of x, or of x and y one after the other, at these places.
#if defined(__clang__)
template <class V>
inline V shuffled(V x, V y, Bits places) {
    V out;
    for (int i = 0; i < LANES; i++) out[i] = places[i] < LANES ? x[places[i]] : y[places[i] - LANES];
    return out;
}

template <class V>
inline V shuffled(V x, Bits places) { return shuffled(x, x, places); }
#else
template <class V>
inline V shuffled(V x, V y, Bits places) { return __builtin_shuffle(x, y, places); }

template <class V>
inline V shuffled(V x, Bits places) { return __builtin_shuffle(x, places); }
#endif

// Reduces the lanes of x to one value.
template <class F>
inline float folded(Vec x, F f) {
    Bits places;
    for (int i = 0; i < LANES; i++) places[i] = i;
    for (int away = LANES / 2; away; away /= 2) x = f(x, shuffled(x, places ^ away));
    return x[0];
}

inline float largest(Vec x) { return folded(x, larger); }

inline float total(Vec x) {
    return folded(x, [](Vec one, Vec other) { return one + other; });
}

constexpr long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

// How often a kernel found no memory and left out part of its work: no exception may leave a thread of OpenMP.
inline std::atomic<long> failed_allocations{0};

// Scratch memory of one thread, which lives as long as the thread and is reused by each work item.
//
// With the address sanitizer, the gaps between the arrays taken from it are poisoned.
class Scratch {
  public:
    ~Scratch() { release(); }
    // Whether there is so much; a work item without it is left out, which ``failed_allocations`` tells.
    [[nodiscard]] bool begin(size_t bytes) {
        bytes += ARRAYS * GAP;
        if (bytes > size) {
            release();
            size = round_up(bytes, 1 << 21);
            memory = static_cast<char*>(std::aligned_alloc(1 << 21, size));
            if (!memory) {
                size = 0;
                failed_allocations++;
                return false;
            }
        }
        used = 0;
#if defined(__SANITIZE_ADDRESS__)
        __asan_poison_memory_region(memory, size);
#endif
        return true;
    }
    template <class T>
    T* take(long count) {
        char* p = memory + used;
        used += round_up(count * sizeof(T), 64) + GAP;
        if (used > size) std::abort();
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(p, count * sizeof(T));
#endif
        return reinterpret_cast<T*>(p);
    }

  private:
#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t GAP = 64, ARRAYS = 16;
#else
    static constexpr size_t GAP = 0, ARRAYS = 0;
#endif
    void release() {
#if defined(__SANITIZE_ADDRESS__)
        if (memory) __asan_unpoison_memory_region(memory, size);
#endif
        std::free(memory);
    }

    char* memory = nullptr;
    size_t size = 0, used = 0;
};

inline Scratch& scratch() {
    static thread_local Scratch own;
    return own;
}
