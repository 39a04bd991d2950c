// Matrix products of a few rows with packed weights, fp32 or bf16 with fp32 accumulation.
//
// A panel of an (n, k) weight matrix is 32 of its rows (zeros beyond n), transposed to (k, 32); in bf16 to (k / 2, 32, 2), the
// layout of AMX and AVX512_BF16.
//
// k is a multiple of 16, in bf16 at least 32: AMX takes 32 at a time.
//
// The product is computed tile by tile, and each tile (ROWS x 32 sums in fp32) is passed to ``take`` while it is in the L1
// cache: the epilogue (bias, activation, residual, rounding). With shorter vectors than AVX-512's, what a tile has beyond the
// columns asked for may be left out.

#pragma once

#include "vec.h"

constexpr long PANEL = 32;

template <class T>
struct Tile;

// A tile of 12, 8 or 4 rows, as many as registers hold; Own::multiply_rows<COUNT> computes it.
template <class Own, class T>
struct InRegisters {
    static constexpr long ROWS = 12;  // of a tile at most
    struct Session {};
    struct Tail {
        Tail(const T*, long) {}
    };

    static long fitting(long rows) { return rows > 8 ? 12 : rows > 4 ? 8 : 4; }

    static void multiply(long rows, const T* a, long lda, const T* panel, const Tail&, long k, float* c, long columns = PANEL) {
        if (rows == 12) return Own::template multiply_rows<12>(a, lda, panel, k, c, columns);
        if (rows == 8) return Own::template multiply_rows<8>(a, lda, panel, k, c, columns);
        Own::template multiply_rows<4>(a, lda, panel, k, c, columns);
    }
};

template <>
struct Tile<float> : InRegisters<Tile<float>, float> {
    template <long COUNT>
    static void multiply_rows(const float* a, long lda, const float* panel, long k, float* c, long columns) {
#if defined(__AVX512F__)
        constexpr long SOME = COUNT, WIDE = PANEL;  // rows and columns whose sums fill the registers
#else
        constexpr long SOME = COUNT % 6 ? 4 : 6, WIDE = 2 * LANES;
#endif
        for (long row = 0; row < COUNT; row += SOME)
            for (long column = 0; column < columns; column += WIDE)
                block<SOME>(a + row * lda, lda, panel + column, k, c + row * PANEL + column);
    }

  private:
    // Two vectors of columns of some rows.
    template <long COUNT>
    static void block(const float* a, long lda, const float* panel, long k, float* c) {
        Vec sums[COUNT][2];
#pragma GCC unroll 16
        for (auto& row : sums) row[0] = row[1] = Vec{};
        for (long i = 0; i < k; i++) {
            Vec left = load(panel + i * PANEL), right = load(panel + i * PANEL + LANES);
#pragma GCC unroll 16
            for (long row = 0; row < COUNT; row++) {
                Vec x = all(a[row * lda + i]);
                sums[row][0] += x * left;
                sums[row][1] += x * right;
            }
        }
#pragma GCC unroll 16
        for (long row = 0; row < COUNT; row++) {
            store(c + row * PANEL, sums[row][0]);
            store(c + row * PANEL + LANES, sums[row][1]);
        }
    }
};

#if defined(__AMX_BF16__)

template <>
struct Tile<bf16> {
    static constexpr long ROWS = 32, DEPTH = 32;  // of a tile at most

    // Configures the AMX tiles, and restores the configuration afterwards: oneDNN uses them, too.
    struct Session {
        struct alignas(64) Shapes {
            uint8_t palette = 0, start = 0, none[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } before;
        Session() {
            Shapes own;
            own.palette = 1;
            for (int i = 0; i < 8; i++) own.bytes[i] = 64, own.rows[i] = 16;
            _tile_storeconfig(&before);
            _tile_loadconfig(&own);
        }
        ~Session() {
            if (before.palette)
                _tile_loadconfig(&before);
            else
                _tile_release();
        }
    };

    // The last 32 of k, of which the first 16 are zeros: where k is an odd multiple of 16 the last step overlaps the one before.
    struct Tail {
        alignas(64) bf16 panel[DEPTH * PANEL];
        Tail(const bf16* whole, long k) {
            if (k % DEPTH == 0) return;
            std::memset(panel, 0, sizeof panel / 2);
            std::memcpy(panel + sizeof panel / sizeof(bf16) / 2, whole + (k - DEPTH / 2) * PANEL, sizeof panel / 2);
        }
    };

    static long fitting(long rows) { return rows > 16 ? 32 : 16; }

    static void multiply(long rows, const bf16* a, long lda, const bf16* panel, const Tail& tail, long k, float* c, long = PANEL) {
        _tile_zero(0);
        _tile_zero(1);
        if (rows == 16) {
            for (long i = 0; i < k; i += DEPTH) {
                const bool over = i + DEPTH > k;
                const bf16 *left = a + (over ? k - DEPTH : i), *right = over ? tail.panel : panel + i * PANEL;
                _tile_loadd(4, left, lda * 2);
                _tile_loadd(6, right, 4 * PANEL);
                _tile_loadd(7, right + PANEL, 4 * PANEL);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
            }
            _tile_stored(0, c, 4 * PANEL);
            _tile_stored(1, c + LANES, 4 * PANEL);
            return;
        }
        _tile_zero(2);
        _tile_zero(3);
        for (long i = 0; i < k; i += DEPTH) {
            const bool over = i + DEPTH > k;
            const bf16 *left = a + (over ? k - DEPTH : i), *right = over ? tail.panel : panel + i * PANEL;
            _tile_loadd(4, left, lda * 2);
            _tile_loadd(6, right, 4 * PANEL);
            _tile_loadd(7, right + PANEL, 4 * PANEL);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, left + 16 * lda, lda * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c, 4 * PANEL);
        _tile_stored(1, c + LANES, 4 * PANEL);
        _tile_stored(2, c + 16 * PANEL, 4 * PANEL);
        _tile_stored(3, c + 16 * PANEL + LANES, 4 * PANEL);
    }
};

#elif defined(__AVX512BF16__)

template <>
struct Tile<bf16> : InRegisters<Tile<bf16>, bf16> {
    template <long COUNT>
    static void multiply_rows(const bf16* a, long lda, const bf16* panel, long k, float* c, long) {
        __m512 sums[COUNT][2];
#pragma GCC unroll 16
        for (auto& row : sums) row[0] = row[1] = _mm512_setzero_ps();
        for (long i = 0; i < k; i += 2) {
            const bf16* pairs = panel + i * PANEL;
            auto left = as<__m512bh>(_mm512_loadu_si512(pairs)), right = as<__m512bh>(_mm512_loadu_si512(pairs + PANEL));
#pragma GCC unroll 16
            for (long row = 0; row < COUNT; row++) {
                int32_t pair;
                std::memcpy(&pair, a + row * lda + i, sizeof pair);
                auto x = as<__m512bh>(_mm512_set1_epi32(pair));
                sums[row][0] = _mm512_dpbf16_ps(sums[row][0], x, left);
                sums[row][1] = _mm512_dpbf16_ps(sums[row][1], x, right);
            }
        }
#pragma GCC unroll 16
        for (long row = 0; row < COUNT; row++) {
            _mm512_storeu_ps(c + row * PANEL, sums[row][0]);
            _mm512_storeu_ps(c + row * PANEL + LANES, sums[row][1]);
        }
    }
};

#endif

// The same for fewer rows than a tile has, padded with zeros, in chunks of k.
template <class T>
void multiply_few(long rows, const T* a, long lda, long m, const T* panel, long k, float* c) {
    constexpr long CHUNK = 512;
    alignas(64) T filled[Tile<T>::ROWS * CHUNK] = {};
    alignas(64) float sum[Tile<T>::ROWS * PANEL];
    for (long first = 0, part; first < k; first += part) {
        part = k - first < CHUNK ? k - first : k - first - CHUNK == 16 ? CHUNK - 16 : CHUNK;  // none is of 16 alone
        for (long i = 0; i < m; i++) std::memcpy(filled + i * CHUNK, a + i * lda + first, part * sizeof(T));
        const T* own = panel + first * PANEL;
        Tile<T>::multiply(rows, filled, CHUNK, own, typename Tile<T>::Tail(own, part), part, first ? sum : c);
        for (long i = 0; first && i < rows * PANEL; i += LANES) store(c + i, load(c + i) + load(sum + i));
    }
}

// a (m, k) times n columns of ``panels``, each ``depth`` * PANEL elements; calls take(row, rows, column, columns, c).
// The tile at c has a row stride of PANEL, and rows x columns valid elements.
template <class T, class Take>
inline void multiply(const T* a, long lda, long m, const T* panels, long depth, long k, long n, Take take) {
    alignas(64) float c[Tile<T>::ROWS * PANEL];
    for (long column = 0; column < n; column += PANEL) {
        const T* panel = panels + column * depth;
        const typename Tile<T>::Tail tail(panel, k);
        const long columns = n - column < PANEL ? n - column : PANEL;
        for (long row = 0; row < m;) {
            const long rows = Tile<T>::fitting(m - row), fresh = m - row < rows ? m - row : rows;
            const long start = row + fresh - rows;  // the last tile overlaps the one before
            if (start >= 0)
                Tile<T>::multiply(rows, a + start * lda, lda, panel, tail, k, c, columns);
            else
                multiply_few(rows, a, lda, m, panel, k, c);
            take(row, fresh, column, columns, start >= 0 ? c + (rows - fresh) * PANEL : c);
            row += fresh;
        }
    }
}

// Transposes 16x16 elements of 32 bits: to[j·ldt + i] = from[i·ldf + j]
#if defined(__AVX512F__)
inline void transpose(const int32_t* from, long ldf, int32_t* to, long ldt) {
    Bits rows[16], transposed[16];
    for (int i = 0; i < 16; i++) std::memcpy(&rows[i], from + i * ldf, sizeof(Bits));
    // In four steps, every second element is exchanged between rows at a distance of 1, 2, 4 and 8.
#define EXCHANGE(from, to, distance, low, high)                  \
    for (int i = 0; i < 16; i++)                                 \
        if (!(i & distance)) {                                   \
            to[i] = shuffled(from[i], from[i + distance], low);             \
            to[i + distance] = shuffled(from[i], from[i + distance], high); \
        }
    const Bits low1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    const Bits low2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    const Bits low4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    const Bits low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    EXCHANGE(rows, transposed, 1, low1, (low1 + 1))
    EXCHANGE(transposed, rows, 2, low2, (low2 + 2))
    EXCHANGE(rows, transposed, 4, low4, (low4 + 4))
    EXCHANGE(transposed, rows, 8, low8, (low8 + 8))
#undef EXCHANGE
    for (int i = 0; i < 16; i++) std::memcpy(to + i * ldt, &rows[i], sizeof(Bits));
}
#else
inline void transpose(const int32_t* from, long ldf, int32_t* to, long ldt) {
    for (int j = 0; j < 16; j++)
        for (int i = 0; i < 16; i++) to[j * ldt + i] = from[i * ldf + j];
}
#endif
