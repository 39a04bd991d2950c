// An inverted residual: expansion (1x1), depthwise convolution, projection (1x1), with SiLU after the first two.
//
// The hidden map, several times as wide as the input, is never stored as a whole: some channels of some rows of it are
// computed, convolved and projected while they are in a core's L2 cache. Within those, sixteen channels are contiguous.
//
// The output may be written over the input: the halo of each region is copied before.

#include <algorithm>
#include <memory>
#include <new>

#include "depthwise.h"
#include "gemm.h"

namespace {

constexpr long CACHE = 1 << 20;  // bytes of the hidden map and its weights in use at a time
constexpr long MIN_POSITIONS = 128;  // of the output at a time, in whole rows
constexpr long MAX_COLUMNS = 128;    // of a region, about: with wider rows few hidden channels would fit the cache

struct Shape {
    long batch, height, width, channels, hidden, outputs, size;
};

template <class T>
struct Work {
    const T *x, *residual;
    T* out;
    const T* expand;
    const float *expand_bias, *depthwise, *depthwise_bias;
    const T* project;
    const float* project_bias;
    Shape s;
};

// A work item: rows and columns (ends exclusive) of some images. The images share each read of the hidden channels' weights.
struct Region {
    long image, images, top, bottom, left, right;
};

// A copy of the halo of a region: rows above, rows below, and columns to the left and right of each row.
template <class T>
class Frame {
  public:
    Frame(const Shape& s, const Region& p, T* memory) : s(s), p(p), halo(s.size / 2), memory(memory) {
        left = std::max<long>(p.left - halo, 0), right = std::min(p.right + halo, s.width);
    }

    long size() const { return 2 * halo * (p.right - p.left + 2 * halo + p.bottom - p.top) * s.channels; }

    void copy(const T* x) {
        for (long y = std::max<long>(p.top - halo, 0); y < std::min(p.bottom + halo, s.height); y++) {
            const T* row = x + (p.image * s.height + y) * s.width * s.channels;
            if (outside(y)) {
                put(at(y), row + left * s.channels, right - left);
                continue;
            }
            put(at(y), row + left * s.channels, p.left - left);
            put(at(y) + halo * s.channels, row + p.right * s.channels, right - p.right);
        }
    }

    // Row y with its halo; assembled in ``to`` where it isn't contiguous.
    const T* row(const T* x, long y, T* to) const {
        if (outside(y)) return at(y);
        put(to, at(y), p.left - left);
        put(to + (p.left - left) * s.channels, x + ((p.image * s.height + y) * s.width + p.left) * s.channels,
            p.right - p.left);
        put(to + (p.right - left) * s.channels, at(y) + halo * s.channels, right - p.right);
        return to;
    }

  private:
    bool outside(long y) const { return y < p.top || y >= p.bottom; }
    T* at(long y) const {
        const long rows = y < p.top ? y - p.top + halo : y - p.bottom + halo;  // of the rows outside
        const long wide = p.right - p.left + 2 * halo;
        return memory + (outside(y) ? rows * wide : 2 * halo * (wide + y - p.top)) * s.channels;
    }
    void put(T* to, const T* from, long positions) const { std::memcpy(to, from, positions * s.channels * sizeof(T)); }

    const Shape& s;
    const Region& p;
    long halo, left, right;
    T* memory;
};

template <class T>
class Piece {
  public:
    // ``frame`` is null where the output isn't written over the input.
    Piece(const Work<T>& work, const Region& part, const Frame<T>* frame)
        : w(work), s(work.s), p(part), frame(frame), width(p.right - p.left) {
        halo = s.size / 2;
        step = std::min(p.bottom - p.top, (MIN_POSITIONS + width - 1) / width);
        held = step + 2 * halo;
        line = (width + 2 * halo) * LANES;
        block = held * line + AT_ONCE * LANES;  // of 16 channels, and what depthwise.h may read beyond
        const long column = block * 4 + (step * width + s.channels + s.outputs) * LANES * sizeof(T);
        block_channels = std::min(s.hidden, std::max<long>(PANEL, CACHE / column * LANES / PANEL * PANEL));
        const long results = block_channels == s.hidden ? 0 : p.images * (p.bottom - p.top) * width * s.outputs;
        Scratch& memory = scratch();
        const long row_size = frame ? (width + 2 * halo) * s.channels : 0;
        const long floats = block_channels / LANES * block + results, others = step * width * block_channels + row_size;
        if (!memory.begin(floats * 4 + others * sizeof(T) + 1024)) return;
        map = memory.take<float>(block_channels / LANES * block);
        convolved = memory.take<T>(step * width * block_channels);
        sums = memory.take<float>(results);
        row_buffer = memory.take<T>(row_size);
        std::memset(map, 0, block_channels / LANES * block * sizeof(float));
    }

    void run() {
        if (!map) return;  // there was no memory
        for (first = 0; first < s.hidden; first += block_channels) {
            some = std::min(block_channels, s.hidden - first);
            for (long i = 0; i < p.images; i++)
                for (long y = p.top; y < p.bottom; y += step) {
                    const long rows = std::min(step, p.bottom - y);
                    expand(p.image + i, y, rows);
                    convolve_rows(y, rows);
                    project(i, y, rows);
                }
        }
    }

  private:
    // The offset of a hidden row in a ring buffer of ``held`` rows.
    long row_offset(long row) const { return (row - p.top + halo) % held * line; }

    // Computes the further hidden rows that ``rows`` rows at y need: 1x1 convolution and SiLU, zeros outside the image.
    void expand(long image, long y, long rows) {
        const long made = y > p.top ? y + halo : y - halo, end = y + rows + halo;
        for (long row = made; row < end; row++)
            if (row < 0 || row >= s.height)
                for (long c = 0; c < some / LANES; c++)
                    std::memset(map + c * block + row_offset(row), 0, line * sizeof(float));
        const long from = std::max<long>(made, 0), to = std::min(end, s.height);
        const long left = std::max<long>(p.left - halo, 0), right = std::min(p.right + halo, s.width);
        const bool whole = right - left == s.width;
        for (long row = from, rows; row < to; row += rows) {
            const bool untouched = !frame || (whole && row >= p.top && row < p.bottom);
            const T* own = w.x + ((image * s.height + row) * s.width + left) * s.channels;
            rows = !whole || !untouched ? 1 : (frame ? std::min(to, p.bottom) : to) - row;  // contiguous rows at once
            expand(untouched ? own : frame->row(w.x, row, row_buffer), row, rows, left, right);
        }
    }

    // ``rows`` rows at y, columns left to right, whose input begins at ``own``.
    void expand(const T* own, long y, long rows, long left, long right) {
        multiply(own, s.channels, rows * (right - left), w.expand + first * s.channels, s.channels, s.channels, some,
                 [&](long token, long tokens, long channel, long, const float* c) {
                     const Vec16 low = load(w.expand_bias + first + channel);
                     const Vec16 high = load(w.expand_bias + first + channel + LANES);
                     float* begin = map + channel / LANES * block + (halo - p.left) * LANES;
                     long row = y + token / (right - left), x = left + token % (right - left);
                     float* line = begin + row_offset(row);
                     for (long i = 0; i < tokens; i++, c += PANEL) {
                         store(line + x * LANES, silu<T>(load(c) + low));
                         store(line + x * LANES + block, silu<T>(load(c + LANES) + high));
                         if (++x == right) x = left, line = begin + row_offset(++row);
                     }
                 });
    }

    // Depthwise convolution and SiLU of the rows at y.
    void convolve_rows(long y, long rows) {
        long offsets[MIN_POSITIONS + 2 * MAX_HALO];
        for (long i = 0; i < rows + 2 * halo; i++) offsets[i] = row_offset(y - halo + i);
        for (long c = 0; c < some; c += LANES) {
            const auto from = [&, own = map + c / LANES * block](long i) { return own + offsets[i]; };
            const float* weight = w.depthwise + first + c;
            const Vec16 bias = load(w.depthwise_bias + first + c);
            const auto keep = [&](long token, Vec16 sum) { store(convolved + token * some + c, silu<T>(sum)); };
            if (s.size == 3) convolve<3>(from, rows, width, weight, s.hidden, bias, keep);
            if (s.size == 5) convolve<5>(from, rows, width, weight, s.hidden, bias, keep);
            if (s.size == 7) convolve<7>(from, rows, width, weight, s.hidden, bias, keep);
        }
    }

    // Adds these hidden channels' contribution to the output of the i-th image.
    void project(long i, long y, long rows) {
        const long corner = ((p.image + i) * s.height + y) * s.width + p.left;
        float* own = sums + (i * (p.bottom - p.top) + y - p.top) * width * s.outputs;
        multiply(convolved, some, rows * width, w.project + first * PANEL, s.hidden, some, s.outputs,
                 [&](long token, long tokens, long channel, long columns, const float* c) {
                     for (long t = token; t < token + tokens; t++, c += PANEL) {
                         const long position = corner + t / width * s.width + t % width;
                         for (long j = channel; j < channel + columns; j += LANES) {
                             const long at = position * s.outputs + j;
                             Vec16 value = load(c + j - channel);
                             if (first) value += load(own + t * s.outputs + j);
                             if (first + some < s.hidden) {
                                 store(own + t * s.outputs + j, value);
                                 continue;
                             }
                             value += load(w.project_bias + j);
                             if (w.residual) value += load(w.residual + at);
                             store(w.out + at, value);
                         }
                     }
                 });
    }

    const Work<T>& w;
    const Shape& s;
    const Region p;
    const Frame<T>* frame;
    long width, halo, step, held, line, block, block_channels, first = 0, some = 0;
    float *map = nullptr, *sums;
    T *convolved, *row_buffer;
};

template <class T>
void all_of(const Work<T>& work, long threads) {
    const Shape& s = work.s;
    // The halo of a band is computed twice, so bands are as high as leaves work for every thread.
    const long for_all = std::min((threads + s.batch - 1) / s.batch, std::max<long>(1, s.height / s.size));
    const long even = std::min(2 * threads, s.height / (4 * s.size)) / threads * threads;
    long bands = s.batch % threads == 0 ? 1 : std::max(for_all, even);
    const long rows = (s.height + bands - 1) / bands;
    bands = (s.height + rows - 1) / rows;
    const long each = std::max<long>(1, (s.batch + threads - 1) / threads);  // images per thread
    const long images = bands > 1 ? 1 : std::clamp<long>(512 / (s.height * s.width), 1, each);
    const long across = (s.width + MAX_COLUMNS - 1) / MAX_COLUMNS, columns = (s.width + across - 1) / across;
    const long pieces = (s.batch + images - 1) / images * bands * across;
    const auto part = [&](long i) {
        const long image = i / across / bands * images, top = i / across % bands * rows, left = i % across * columns;
        return Region{image, std::min(images, s.batch - image), top, std::min(s.height, top + rows),
                    left,  std::min(s.width, left + columns)};
    };
    const bool framed = work.x == work.out && bands * across > 1;
    const long frame_size = framed ? Frame<T>(s, part(0), nullptr).size() : 0;  // no region is larger than the first
    std::unique_ptr<T[]> frames(new (std::nothrow) T[pieces * frame_size]);
    if (!frames) {
        failed_allocations++;
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for
        for (long i = 0; i < (framed ? pieces : 0); i++) {
            const Region own = part(i);
            Frame<T>(s, own, frames.get() + i * frame_size).copy(work.x);
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < pieces; i++) {
            const Region own = part(i);
            const Frame<T> frame(s, own, frames.get() + i * frame_size);
            Piece<T>(work, own, framed ? &frame : nullptr).run();
        }
    }
}

}  // namespace

#define INVERTED_RESIDUAL(NAME, T)                                                                                        \
    extern "C" void NAME(const T* x, const T* residual, T* out, const T* expand, const float* expand_bias,      \
                         const float* depthwise, const float* depthwise_bias, const T* project, const float* project_bias, \
                         long batch, long height, long width, long channels, long hidden, long outputs, long size, \
                         long threads) {                                                                         \
        Shape shape{batch, height, width, channels, hidden, outputs, size};                                      \
        all_of(Work<T>{x, residual, out, expand, expand_bias, depthwise, depthwise_bias, project, project_bias, shape}, threads); \
    }

INVERTED_RESIDUAL(inverted_residual_fp32, float)
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
INVERTED_RESIDUAL(inverted_residual_bf16, bf16)
#endif
