// An inverted residual of any CNN: expansion (1x1), depthwise convolution, squeeze-and-excitation, projection (1x1), each
// optional, with activations after the convolutions. Without the depthwise convolution it is a perceptron of each position.
//
// The hidden map, several times as wide as the input, is never stored as a whole: some channels of some rows of it are
// computed, convolved and projected while they are in a core's L2 cache. Within those, sixteen channels are contiguous.
// Squeeze-and-excitation must have seen all of an image before any of it is projected: the convolution's output is stored for
// as many images at a time as make work for every thread.
//
// The output may be written over the input where all sizes are equal: the halo of each region is copied before.

#include <algorithm>
#include <memory>
#include <new>

#include "depthwise.h"
#include "regions.h"
#include "squeeze.h"

namespace {

constexpr long CACHE = 1 << 20;  // bytes of the hidden map and its weights in use at a time
constexpr long MIN_POSITIONS = 128;  // of the output at a time, in whole rows
constexpr long AT_A_TIME = 192;      // positions without a depthwise convolution: a multiple of every tile's rows

template <class T>
struct Work {
    const T *x, *residual;
    T* out;
    const T* expand;  // null where the depthwise convolution comes first; ``depthwise`` null where there is none
    const float *expand_bias, *depthwise, *depthwise_bias;
    const T* project;  // null where it comes last
    const float* project_bias;
    Activation expanded, convolved, projected;
    const Squeeze* squeeze;  // null where there is none
    T* maps;                 // room for the convolution's output of so many images as it takes at a time
    Shape s;
};

// Stores act(sums) with a stride, and adds it to ``total`` where given.
template <class T>
__attribute__((noinline)) void keep(const Activation& act, const Vec* sums, long count, T* to, long stride, long lanes,
                                    Vec* total) {
    act.with<T>([=](auto f) {
        if (!total && lanes >= LANES) {
            for (long k = 0; k < count; k++) store(to + k * stride, f(sums[k]));
            return;
        }
        for (long k = 0; k < count; k++) {
            const Vec value = f(sums[k]);
            store_some(to + k * stride, value, lanes);
            if (total) *total += value;
        }
    });
}

// Adds bias and residual to a tile c of the projection, and stores it; position(token) says where.
template <class T, class Position, class Add>
void deliver(const Work<T>& w, long token, long tokens, long channel, long columns, const float* c, Position position, Add add) {
    w.projected.template with<T>([&](auto f) {
        for (long t = token; t < token + tokens; t++, c += PANEL) {
            const long start = position(t) * w.s.outputs;
            for (long j = channel; j < channel + columns; j += LANES) {
                const long lanes = channel + columns - j;
                Vec value = load(c + j - channel);
                if (!add(t, j, value)) continue;
                value += load(w.project_bias + j);
                if (w.residual) value += load_some(w.residual + start + j, lanes);
                store_some(w.out + start + j, f(value), lanes);
            }
        }
    });
}

template <class T>
class Piece {
  public:
    // ``frame`` is null where the output isn't written over the input. With squeeze-and-excitation the convolution's output
    // goes to ``maps``, and its sums over positions to ``totals`` (images, hidden).
    Piece(const Work<T>& work, const Region& part, const Frame<T>* frame, T* maps = nullptr, float* totals = nullptr)
        : w(work), s(work.s), p(part), frame(frame), maps(maps), totals(totals), width(p.right - p.left) {
        step = std::min(p.bottom - p.top, (MIN_POSITIONS + width - 1) / width);
        held = (step - 1) * s.stride + s.size;
        begin = p.top * s.stride - s.above, edge = p.left * s.stride - s.before;
        left = std::max<long>(edge, 0), right = std::min((p.right - 1) * s.stride - s.before + s.size, s.width);
        line = ((width - 1) * s.stride + s.size) * LANES;
        block = held * line + AT_ONCE * s.stride * LANES;  // of 16 channels, and what depthwise.h may read beyond
        const long column = block * 4 + (step * width + s.channels + s.outputs) * LANES * sizeof(T);
        block_channels = std::min(s.hidden, std::max<long>(PANEL, CACHE / column * LANES / PANEL * PANEL));
        projects = w.project && !maps;
        const long results =
            block_channels == s.hidden || !projects ? 0 : p.images * (p.bottom - p.top) * width * round_up(s.outputs, LANES);
        Scratch& memory = scratch();
        const long row_size = frame ? line / LANES * s.channels : filled() ? held * (right - left) * s.depth : 0;
        const long kept = projects ? step * width * block_channels : 0;
        const long floats = block_channels / LANES * block + results, others = kept + row_size;
        if (!memory.begin(floats * 4 + others * sizeof(T) + 1024)) return;
        map = memory.take<float>(block_channels / LANES * block);
        convolved = memory.take<T>(kept);
        sums = memory.take<float>(results);
        row_buffer = memory.take<T>(row_size);
        std::memset(map, 0, block_channels / LANES * block * sizeof(float));
        if (filled()) std::memset(row_buffer, 0, row_size * sizeof(T));
    }

    void run() {
        if (!map) return;  // there was no memory
        for (first = 0; first < s.hidden; first += block_channels) {
            some = std::min(block_channels, s.hidden - first);
            for (long i = 0; i < p.images; i++)
                for (long y = p.top; y < p.bottom; y += step) {
                    const long rows = std::min(step, p.bottom - y);
                    make(p.image + i, y, rows);
                    convolve_rows(i, y, rows);
                    if (projects) project(i, y, rows);
                }
        }
    }

  private:
    // Whether the product wants more channels than the input has.
    bool filled() const { return w.expand && s.depth != s.channels; }

    // The offset of a hidden row in a ring buffer of ``held`` rows.
    long row_offset(long row) const { return (row - begin) % held * line; }

    // Makes the further hidden rows that ``rows`` rows of the output at y need: zeros outside the image.
    void make(long image, long y, long rows) {
        const long first_row = y * s.stride - s.above, end = first_row + (rows - 1) * s.stride + s.size;
        const long made = y > p.top ? first_row + s.size - s.stride : first_row;
        for (long row = made; row < end; row++)
            if (row < 0 || row >= s.height)
                for (long c = 0; c < some / LANES; c++)
                    std::memset(map + c * block + row_offset(row), 0, line * sizeof(float));
        const long from = std::max<long>(made, 0), to = std::min(end, s.height);
        const bool whole = right - left == s.width;
        for (long row = from, rows; row < to; row += rows) {
            const bool untouched = !frame || (whole && row >= p.top && row < p.bottom);
            const T* own = w.x + ((image * s.height + row) * s.width + left) * s.channels;
            rows = !whole || !untouched ? 1 : (frame ? std::min(to, p.bottom) : to) - row;  // contiguous rows at once
            if (!w.expand)
                copy(own, row, rows);
            else
                expand(untouched ? with_depth(own, rows * (right - left)) : frame->row(w.x, row, row_buffer), row, rows);
        }
    }

    // So many positions with as many channels as the expansion takes, zeros beyond the input's.
    const T* with_depth(const T* own, long positions) {
        if (!filled()) return own;
        for (long i = 0; i < positions; i++)
            std::memcpy(row_buffer + i * s.depth, own + i * s.channels, s.channels * sizeof(T));
        return row_buffer;
    }

    // Expands ``rows`` rows at y, whose input begins at ``own``: 1x1 convolution and activation.
    void expand(const T* own, long y, long rows) {
        multiply(own, s.depth, rows * (right - left), w.expand + first * s.depth, s.depth, s.depth, std::min(some, s.used - first),
                 [&](long token, long tokens, long channel, long, const float* c) {
                     Vec bias[PANEL / LANES];
                     const long vectors = std::min(PANEL, s.used - first - channel) / LANES;
                     for (long k = 0; k < vectors; k++) bias[k] = load(w.expand_bias + first + channel + k * LANES);
                     float* to = map + channel / LANES * block - edge * LANES;
                     w.expanded.template with<T>([&](auto f) {
                         long row = y + token / (right - left), x = left + token % (right - left);
                         float* line = to + row_offset(row);
                         for (long i = 0; i < tokens; i++, c += PANEL) {
                             for (long k = 0; k < vectors; k++)
                                 store(line + x * LANES + k * block, f(load(c + k * LANES) + bias[k]));
                             if (++x == right) x = left, line = to + row_offset(++row);
                         }
                     });
                 });
    }

    // Copies ``rows`` rows at y, for the depthwise convolution comes first. Of more hidden channels than the input has, each part
    // is of all input channels.
    void copy(const T* own, long y, long rows) {
        for (long row = y; row < y + rows; row++, own += s.width * s.channels)
            for (long c = 0; c < some && first + c < s.used; c += LANES) {
                float* to = map + c / LANES * block + row_offset(row) + (left - edge) * LANES;
                const long channel = (first + c) % s.channels, lanes = s.channels - channel;
                const T* from = own + channel;
                for (long x = 0; x < right - left; x++) store(to + x * LANES, load_some(from + x * s.channels, lanes));
            }
    }

    // Depthwise convolution and activation of the rows of the output at y.
    void convolve_rows(long i, long y, long rows) {
        long offsets[2 * (MIN_POSITIONS + MAX_HALO)];
        for (long j = 0; j < (rows - 1) * s.stride + s.size; j++) offsets[j] = row_offset(y * s.stride - s.above + j);
        const long channels = projects ? some : maps ? s.hidden : s.outputs;  // of what the result goes to
        const long across = projects ? width : s.out_width;
        T* to = convolved;
        if (!projects) {
            const long image = maps ? i : p.image + i;
            to = (maps ? maps : w.out) + ((image * s.out_height + y) * s.out_width + p.left) * channels + first;
        }
        for (long c = 0; c < some; c += LANES) {
            T* own_to = to + c;
            const long lanes = projects || maps ? LANES : s.outputs - first - c;
            if (lanes <= 0) continue;  // padding to sixteen channels that fills a shorter vector
            if (first + c >= s.used) {
                for (long t = 0; (projects || maps) && t < rows * width; t++)
                    store(own_to + (t / width * across + t % width) * channels, Vec{});
                continue;
            }
            const auto from = [&, own = map + c / LANES * block](long j) { return own + offsets[j]; };
            const float* weight = w.depthwise + first + c;
            const Vec bias = load(w.depthwise_bias + first + c);
            Vec total{};
            const auto take = [&](long row, long x, long count, const Vec* sums) {
                keep(w.convolved, sums, count, own_to + (row * across + x) * channels, channels, lanes, maps ? &total : nullptr);
            };
            if (s.stride == 1) {
                if (s.size == 3) convolve<3>(from, rows, width, weight, s.hidden, bias, take);
                if (s.size == 5) convolve<5>(from, rows, width, weight, s.hidden, bias, take);
                if (s.size == 7) convolve<7>(from, rows, width, weight, s.hidden, bias, take);
            } else {
                if (s.size == 3) convolve<3, 2>(from, rows, width, weight, s.hidden, bias, take);
                if (s.size == 5) convolve<5, 2>(from, rows, width, weight, s.hidden, bias, take);
                if (s.size == 7) convolve<7, 2>(from, rows, width, weight, s.hidden, bias, take);
            }
            if (!maps) continue;
            float* sum = totals + i * s.hidden + first + c;
            store(sum, load(sum) + total);
        }
    }

    // Adds these hidden channels' contribution to the output of the i-th image.
    void project(long i, long y, long rows) {
        const long corner = ((p.image + i) * s.out_height + y) * s.out_width + p.left, wide = round_up(s.outputs, LANES);
        float* own = sums + (i * (p.bottom - p.top) + y - p.top) * width * wide;
        multiply(convolved, some, rows * width, w.project + first * PANEL, s.hidden, some, s.outputs,
                 [&](long token, long tokens, long channel, long columns, const float* c) {
                     const auto position = [&](long t) { return corner + t / width * s.out_width + t % width; };
                     const auto add = [&](long t, long j, Vec& value) {
                         if (first) value += load(own + t * wide + j);
                         if (first + some < s.hidden) store(own + t * wide + j, value);
                         return first + some >= s.hidden;
                     };
                     deliver(w, token, tokens, channel, columns, c, position, add);
                 });
    }

    const Work<T>& w;
    const Shape& s;
    const Region p;
    const Frame<T>* frame;
    T* maps;
    float* totals;
    long width, step, held, line, block, block_channels, first = 0, some = 0;
    long begin, edge, left, right;  // of the hidden map: its first row and column, and the columns inside the image
    bool projects;
    float *map = nullptr, *sums;
    T *convolved, *row_buffer;
};

// Scales and projects some positions of an image; ``map`` is the convolution's output there.
template <class T>
void project_scaled(const Work<T>& w, T* map, const float* gates, long start, long positions) {
    const long hidden = w.s.hidden;
    for (long i = 0; i < positions; i++)
        for (long c = 0; c < hidden; c += LANES) store(map + i * hidden + c, load(map + i * hidden + c) * load(gates + c));
    multiply(map, hidden, positions, w.project, hidden, hidden, w.s.outputs,
             [&](long token, long tokens, long channel, long columns, const float* c) {
                 const auto position = [&](long t) { return start + t; };
                 deliver(w, token, tokens, channel, columns, c, position, [](long, long, Vec&) { return true; });
             });
}

template <class T>
void with_squeeze(const Work<T>& work, long threads) {
    const Shape& s = work.s;
    const Division division(s, threads);
    const long images = division.images, parts = division.per_image(), hidden = s.hidden;
    const long at_once = std::max(images, std::min(work.squeeze->images, s.batch) / images * images);
    const long positions = s.out_height * s.out_width, chunks = (positions + MIN_POSITIONS - 1) / MIN_POSITIONS;
    std::unique_ptr<float[]> totals(new (std::nothrow) float[at_once * parts * hidden]);
    if (!totals) {
        failed_allocations++;
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
        for (long start = 0; start < s.batch; start += at_once) {
            const long count = std::min(at_once, s.batch - start);
            const auto map = [&](long image) { return work.maps + image * positions * hidden; };
            // The sums of a piece, (images, hidden), follow each other; those of a group's first piece become its gates.
            const auto sums = [&](long piece, long image) { return totals.get() + (piece * images + image) * hidden; };
#pragma omp for schedule(dynamic)
            for (long i = 0; i < (count + images - 1) / images * parts; i++) {
                const Region own = division.part(s, start / images * parts + i);
                std::memset(sums(i, 0), 0, images * hidden * sizeof(float));
                Piece<T>(work, own, nullptr, map(own.image - start), sums(i, 0)).run();
            }
            const auto gates = [&](long image) { return sums(image / images * parts, image % images); };
#pragma omp for
            for (long i = 0; i < count; i++) {
                for (long k = 1; k < parts; k++)
                    for (long c = 0; c < hidden; c += LANES)
                        store(gates(i) + c, load(gates(i) + c) + load(sums(i / images * parts + k, i % images) + c));
                excite(*work.squeeze, hidden, positions, gates(i));
            }
#pragma omp for schedule(dynamic)
            for (long i = 0; i < count * chunks; i++) {
                const long image = i / chunks, first = i % chunks * MIN_POSITIONS;
                project_scaled(work, map(image) + first * hidden, gates(image), (start + image) * positions + first,
                               std::min(MIN_POSITIONS, positions - first));
            }
        }
    }
}

// Expansion and projection without a convolution between them, of positions start to end (exclusive).
template <class T>
void perceptron(const Work<T>& w, long start, long end) {
    const Shape& s = w.s;
    const long count = end - start, wide = round_up(s.outputs, LANES);
    const long column = (count + s.depth + s.outputs) * LANES * sizeof(T);  // of 16 hidden channels
    const long block = std::min(s.hidden, std::max<long>(PANEL, CACHE / column * LANES / PANEL * PANEL));
    const bool filled = s.depth != s.channels, summed = block < s.hidden;
    Scratch& memory = scratch();
    const long inputs = filled ? count * s.depth : 0, results = summed ? count * wide : 0;
    if (!memory.begin((count * block + inputs) * sizeof(T) + results * sizeof(float) + 1024)) return;
    T *hidden = memory.take<T>(count * block), *copied = memory.take<T>(inputs);
    float* sums = memory.take<float>(results);
    const T* x = w.x + start * s.channels;
    if (filled) {
        std::memset(copied, 0, inputs * sizeof(T));
        for (long i = 0; i < count; i++) std::memcpy(copied + i * s.depth, x + i * s.channels, s.channels * sizeof(T));
        x = copied;
    }
    for (long first = 0, some; first < s.hidden; first += some) {
        some = std::min(block, s.hidden - first);
        multiply(x, s.depth, count, w.expand + first * s.depth, s.depth, s.depth, some,
                 [&](long token, long tokens, long channel, long columns, const float* c) {
                     w.expanded.template with<T>([&](auto f) {
                         for (long j = 0; j < columns; j += LANES) {
                             const Vec bias = load(w.expand_bias + first + channel + j);
                             T* to = hidden + token * some + channel + j;
                             for (long i = 0; i < tokens; i++) store(to + i * some, f(load(c + i * PANEL + j) + bias));
                         }
                     });
                 });
        multiply(hidden, some, count, w.project + first * PANEL, s.hidden, some, s.outputs,
                 [&](long token, long tokens, long channel, long columns, const float* c) {
                     const auto add = [&](long t, long j, Vec& value) {
                         if (first) value += load(sums + t * wide + j);
                         if (first + some < s.hidden) store(sums + t * wide + j, value);
                         return first + some >= s.hidden;
                     };
                     deliver(w, token, tokens, channel, columns, c, [&](long t) { return start + t; }, add);
                 });
    }
}

template <class T>
void perceptrons(const Work<T>& w, long threads) {
    const long all = w.s.batch * w.s.height * w.s.width, pieces = (all + AT_A_TIME - 1) / AT_A_TIME;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] typename Tile<T>::Session session;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < pieces; i++) perceptron(w, i * AT_A_TIME, std::min(all, (i + 1) * AT_A_TIME));
    }
}

template <class T>
void all_of(const Work<T>& work, long threads) {
    const Shape& s = work.s;
    if (work.squeeze) return with_squeeze(work, threads);
    if (!work.depthwise) return perceptrons(work, threads);
    const Division division(s, threads);
    const long pieces = (s.batch + division.images - 1) / division.images * division.per_image();
    const bool framed = work.x == work.out && division.per_image() > 1;
    const long frame_size = framed ? Frame<T>(s, division.part(s, 0), nullptr).size() : 0;  // no region is larger
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
            const Region own = division.part(s, i);
            Frame<T>(s, own, frames.get() + i * frame_size).copy(work.x);
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < pieces; i++) {
            const Region own = division.part(s, i);
            const Frame<T> frame(s, own, frames.get() + i * frame_size);
            Piece<T>(work, own, framed ? &frame : nullptr).run();
        }
    }
}

}  // namespace

#define INVERTED_RESIDUAL(NAME, T)                                                                                     \
    extern "C" void NAME(const T* x, const T* residual, T* out, const T* expand, const float* expand_bias,             \
                         const float* depthwise, const float* depthwise_bias, const T* project,                       \
                         const float* project_bias, const Shape* shape, const Activation* acts,                       \
                         const Squeeze* squeeze, T* maps, long threads) {                                            \
        all_of(Work<T>{x, residual, out, expand, expand_bias, depthwise, depthwise_bias, project, project_bias,        \
                       acts[0], acts[1], acts[2], squeeze, maps, *shape},                                                    \
               threads);                                                                                               \
    }

INVERTED_RESIDUAL(inverted_residual_fp32, float)
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
INVERTED_RESIDUAL(inverted_residual_bf16, bf16)
#endif
