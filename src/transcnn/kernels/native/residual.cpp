// An inverted residual: expansion (1x1), depthwise convolution, projection (1x1), with SiLU after the first two.
//
// The hidden map, several times as wide as the input, is never whole in memory: some channels of some rows of it are made,
// convolved and projected while they are in a core's own cache. Within those, sixteen channels lie together.
//
// The result may be written over the input: what a piece sees beyond its own rows and columns is copied before.

#include <algorithm>
#include <memory>

#include "depthwise.h"
#include "product.h"

namespace {

constexpr long CACHE = 1 << 20;  // bytes of the hidden map, and of the weights that it meets, at a time
constexpr long POSITIONS = 128;  // of the result at a time, at least, in whole rows
constexpr long WIDE = 128;       // columns at a time, about: of wider rows only few hidden channels would fit the cache

struct Shape {
    long batch, height, width, channels, hidden, outputs, size;
};

template <class T>
struct Work {
    const T *x, *residual;
    T* out;
    const T* expand;
    const float *expand_bias, *mix, *mix_bias;
    const T* project;
    const float* project_bias;
    Shape s;
};

// What is made at a time: rows and columns (the ends exclusive) of some images, one after the other with the same hidden
// channels, whose weights are read from afar once.
struct Part {
    long image, images, top, bottom, left, right;
};

// What lies around a part, as far as ``reach``: rows above, rows below, and beside each row some columns left and right.
template <class T>
class Frame {
  public:
    Frame(const Shape& s, const Part& p, T* memory) : s(s), p(p), reach(s.size / 2), memory(memory) {
        left = std::max<long>(p.left - reach, 0), right = std::min(p.right + reach, s.width);
    }

    long size() const { return 2 * reach * (p.right - p.left + 2 * reach + p.bottom - p.top) * s.channels; }

    void copy(const T* x) {
        for (long y = std::max<long>(p.top - reach, 0); y < std::min(p.bottom + reach, s.height); y++) {
            const T* row = x + (p.image * s.height + y) * s.width * s.channels;
            if (outside(y)) {
                put(at(y), row + left * s.channels, right - left);
                continue;
            }
            put(at(y), row + left * s.channels, p.left - left);
            put(at(y) + reach * s.channels, row + p.right * s.channels, right - p.right);
        }
    }

    // All that is seen of row y, put together in ``to`` where it must be.
    const T* row(const T* x, long y, T* to) const {
        if (outside(y)) return at(y);
        put(to, at(y), p.left - left);
        put(to + (p.left - left) * s.channels, x + ((p.image * s.height + y) * s.width + p.left) * s.channels,
            p.right - p.left);
        put(to + (p.right - left) * s.channels, at(y) + reach * s.channels, right - p.right);
        return to;
    }

  private:
    bool outside(long y) const { return y < p.top || y >= p.bottom; }
    T* at(long y) const {
        const long rows = y < p.top ? y - p.top + reach : y - p.bottom + reach;  // of those outside
        const long wide = p.right - p.left + 2 * reach;
        return memory + (outside(y) ? rows * wide : 2 * reach * (wide + y - p.top)) * s.channels;
    }
    void put(T* to, const T* from, long positions) const { std::memcpy(to, from, positions * s.channels * sizeof(T)); }

    const Shape& s;
    const Part& p;
    long reach, left, right;
    T* memory;
};

template <class T>
class Piece {
  public:
    // ``frame`` is null where the input stays as it is.
    Piece(const Work<T>& work, const Part& part, const Frame<T>* frame)
        : w(work), s(work.s), p(part), frame(frame), width(p.right - p.left) {
        reach = s.size / 2;
        step = std::min(p.bottom - p.top, (POSITIONS + width - 1) / width);
        held = step + 2 * reach;
        line = (width + 2 * reach) * LANES;
        block = held * line + AT_ONCE * LANES;  // of 16 channels; some over
        const long column = block * 4 + (step * width + s.channels + s.outputs) * LANES * sizeof(T);
        together = std::min(s.hidden, std::max<long>(PANEL, CACHE / column * LANES / PANEL * PANEL));
        const long results = together == s.hidden ? 0 : p.images * (p.bottom - p.top) * width * s.outputs;
        Scratch& memory = scratch();
        const long seen = frame ? (width + 2 * reach) * s.channels : 0;
        memory.begin((together / LANES * block + results) * 4 + (step * width * together + seen) * sizeof(T) + 1024);
        map = memory.take<float>(together / LANES * block);
        mixed = memory.take<T>(step * width * together);
        sums = memory.take<float>(results);
        row_seen = memory.take<T>(seen);
        std::memset(map, 0, together / LANES * block * sizeof(float));
    }

    void run() {
        for (first = 0; first < s.hidden; first += together) {
            some = std::min(together, s.hidden - first);
            for (long i = 0; i < p.images; i++)
                for (long y = p.top; y < p.bottom; y += step) {
                    const long rows = std::min(step, p.bottom - y);
                    expand(p.image + i, y, rows);
                    mix(y, rows);
                    project(i, y, rows);
                }
        }
    }

  private:
    // Where a hidden row lies: over the one that was needed last ``held`` rows above.
    long place_of(long row) const { return (row - p.top + reach) % held * line; }

    // The further hidden rows that ``rows`` rows at y need: 1x1 convolution and SiLU, zeros beyond the image.
    void expand(long image, long y, long rows) {
        const long made = y > p.top ? y + reach : y - reach, end = y + rows + reach;
        for (long row = made; row < end; row++)
            if (row < 0 || row >= s.height)
                for (long c = 0; c < some / LANES; c++)
                    std::memset(map + c * block + place_of(row), 0, line * sizeof(float));
        const long from = std::max<long>(made, 0), to = std::min(end, s.height);
        const long left = std::max<long>(p.left - reach, 0), right = std::min(p.right + reach, s.width);
        const bool whole = right - left == s.width;
        for (long row = from, rows; row < to; row += rows) {
            const bool untouched = !frame || (whole && row >= p.top && row < p.bottom);
            const T* own = w.x + ((image * s.height + row) * s.width + left) * s.channels;
            rows = !whole || !untouched ? 1 : (frame ? std::min(to, p.bottom) : to) - row;  // without a gap between them
            expand(untouched ? own : frame->row(w.x, row, row_seen), row, rows, left, right);
        }
    }

    // ``rows`` rows at y from left to right, which begin at own.
    void expand(const T* own, long y, long rows, long left, long right) {
        multiply(own, s.channels, rows * (right - left), w.expand + first * s.channels, s.channels, s.channels, some,
                 [&](long token, long tokens, long channel, long, const float* c) {
                     const Row low = load(w.expand_bias + first + channel);
                     const Row high = load(w.expand_bias + first + channel + LANES);
                     float* begin = map + channel / LANES * block + (reach - p.left) * LANES;
                     long row = y + token / (right - left), x = left + token % (right - left);
                     float* line = begin + place_of(row);
                     for (long i = 0; i < tokens; i++, c += PANEL) {
                         store(line + x * LANES, silu<T>(load(c) + low));
                         store(line + x * LANES + block, silu<T>(load(c + LANES) + high));
                         if (++x == right) x = left, line = begin + place_of(++row);
                     }
                 });
    }

    // Depthwise convolution and SiLU of the rows at y.
    void mix(long y, long rows) {
        long places[POSITIONS + 2 * MOST_REACH];
        for (long i = 0; i < rows + 2 * reach; i++) places[i] = place_of(y - reach + i);
        for (long c = 0; c < some; c += LANES) {
            const auto from = [&, own = map + c / LANES * block](long i) { return own + places[i]; };
            const float* weight = w.mix + first + c;
            const Row bias = load(w.mix_bias + first + c);
            const auto keep = [&](long token, Row sum) { store(mixed + token * some + c, silu<T>(sum)); };
            if (s.size == 3) convolve<3>(from, rows, width, weight, s.hidden, bias, keep);
            if (s.size == 5) convolve<5>(from, rows, width, weight, s.hidden, bias, keep);
            if (s.size == 7) convolve<7>(from, rows, width, weight, s.hidden, bias, keep);
        }
    }

    // What these hidden channels add to the result of the i-th image.
    void project(long i, long y, long rows) {
        const long corner = ((p.image + i) * s.height + y) * s.width + p.left;
        float* own = sums + (i * (p.bottom - p.top) + y - p.top) * width * s.outputs;
        multiply(mixed, some, rows * width, w.project + first * PANEL, s.hidden, some, s.outputs,
                 [&](long token, long tokens, long channel, long columns, const float* c) {
                     for (long t = token; t < token + tokens; t++, c += PANEL) {
                         const long place = corner + t / width * s.width + t % width;
                         for (long j = channel; j < channel + columns; j += LANES) {
                             const long at = place * s.outputs + j;
                             Row value = load(c + j - channel);
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
    const Part p;
    const Frame<T>* frame;
    long width, reach, step, held, line, block, together, first = 0, some = 0;
    float *map, *sums;
    T *mixed, *row_seen;
};

template <class T>
void all_of(const Work<T>& work, long threads) {
    const Shape& s = work.s;
    // Hidden rows around a band are made twice, so bands are high, but for what it takes to have work for every thread.
    const long for_all = std::min((threads + s.batch - 1) / s.batch, std::max<long>(1, s.height / s.size));
    const long even = std::min(2 * threads, s.height / (4 * s.size)) / threads * threads;
    long bands = s.batch % threads == 0 ? 1 : std::max(for_all, even);
    const long rows = (s.height + bands - 1) / bands;
    bands = (s.height + rows - 1) / rows;
    const long each = std::max<long>(1, (s.batch + threads - 1) / threads);  // images of a thread
    const long images = bands > 1 ? 1 : std::clamp<long>(512 / (s.height * s.width), 1, each);
    const long across = (s.width + WIDE - 1) / WIDE, columns = (s.width + across - 1) / across;
    const long pieces = (s.batch + images - 1) / images * bands * across;
    const auto part = [&](long i) {
        const long image = i / across / bands * images, top = i / across % bands * rows, left = i % across * columns;
        return Part{image, std::min(images, s.batch - image), top, std::min(s.height, top + rows),
                    left,  std::min(s.width, left + columns)};
    };
    const bool framed = work.x == work.out && bands * across > 1;
    const long frame_size = framed ? Frame<T>(s, part(0), nullptr).size() : 0;  // the first part is as large as any
    std::unique_ptr<T[]> frames(new T[pieces * frame_size]);
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for
        for (long i = 0; i < (framed ? pieces : 0); i++) {
            const Part own = part(i);
            Frame<T>(s, own, frames.get() + i * frame_size).copy(work.x);
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < pieces; i++) {
            const Part own = part(i);
            const Frame<T> frame(s, own, frames.get() + i * frame_size);
            Piece<T>(work, own, framed ? &frame : nullptr).run();
        }
    }
}

}  // namespace

#define RESIDUAL(NAME, T)                                                                                        \
    extern "C" void NAME(const T* x, const T* residual, T* out, const T* expand, const float* expand_bias,      \
                         const float* mix, const float* mix_bias, const T* project, const float* project_bias, \
                         long batch, long height, long width, long channels, long hidden, long outputs, long size, \
                         long threads) {                                                                         \
        Shape shape{batch, height, width, channels, hidden, outputs, size};                                      \
        all_of(Work<T>{x, residual, out, expand, expand_bias, mix, mix_bias, project, project_bias, shape}, threads); \
    }

RESIDUAL(residual_fp32, float)
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
RESIDUAL(residual_bf16, bf16)
#endif
