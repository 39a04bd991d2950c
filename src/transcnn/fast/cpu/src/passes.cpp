// What takes a pass or two over a map (batch, positions, channels): GroupNorm with one group, LayerNorm, squeeze-and-excitation
// alone, max and average pooling. PyTorch's own take several times as long on channels-last maps in bf16.

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "squeeze.h"

namespace {

constexpr long PIECE = 1 << 15;  // numbers of a map that a work item takes, about

// A map of some images, cut into pieces of whole positions.
struct Pieces {
    long positions, channels, each, count;  // each: positions of a piece; count: pieces of an image

    Pieces(long positions, long channels) : positions(positions), channels(channels) {
        each = std::clamp(PIECE / channels, 1L, positions);
        count = (positions + each - 1) / each;
    }
    long start(long piece) const { return piece * each; }
    long size(long piece) const { return std::min(each, positions - piece * each); }
};

// The sum of f(x) over n numbers, in fp32 of a few thousand at a time.
template <class T, class F>
double summed(const T* x, long n, F f) {
    constexpr long SOME = 4096;
    double result = 0;
    for (long i = 0; i < n;) {
        Vec sums[4] = {};
        const long end = std::min(n, i + SOME);
        for (; i + 4 * LANES <= end; i += 4 * LANES)
            for (long k = 0; k < 4; k++) sums[k] += f(load(x + i + k * LANES));
        for (; i + LANES <= end; i += LANES) sums[0] += f(load(x + i));
        result += total((sums[0] + sums[1]) + (sums[2] + sums[3]));
        for (; i < end; i++) result += f(all(number(x[i])))[0];
    }
    return result;
}

// y = act((x - mean) / sqrt(variance + eps) * scale + shift) + residual with the mean and the variance of each image. y may be
// x or the residual.
template <class T>
struct GroupNorm {
    const T *x, *residual;  // the latter is null where there is none
    T* y;
    const float *scale, *shift;
    float eps;
    Activation act;
    Pieces pieces;

    double sum(long image, long piece) const {
        return summed(at(x, image, piece), pieces.size(piece) * pieces.channels, [](Vec v) { return v; });
    }

    double squares(long image, long piece, double mean) const {
        const Vec middle = all(mean);
        return summed(at(x, image, piece), pieces.size(piece) * pieces.channels,
                      [=](Vec v) { return (v - middle) * (v - middle); });
    }

    void normalise(long image, long piece, double mean, double squares) const {
        const long channels = pieces.channels;
        const float factor = 1 / std::sqrt(squares / (pieces.positions * channels) + eps), middle = mean;
        const T *from = at(x, image, piece), *added = residual ? at(residual, image, piece) : nullptr;
        T* to = at(y, image, piece);
        act.with<T>([&](auto f) {
            for (long i = 0; i < pieces.size(piece) * channels; i += channels)
                for (long c = 0; c < channels; c += LANES) {
                    const long lanes = channels - c;
                    Vec value = (load_some(from + i + c, lanes) - middle) * factor;
                    value = f(value * load_some(scale + c, lanes) + load_some(shift + c, lanes));
                    if (added) value += load_some(added + i + c, lanes);
                    store_some(to + i + c, value, lanes);
                }
        });
    }

    // One after the other; so that an image stays in a core's cache.
    void image(long i) const {
        const double size = double(pieces.positions) * pieces.channels;
        double mean = 0, all_squares = 0;
        for (long k = 0; k < pieces.count; k++) mean += sum(i, k) / size;
        for (long k = 0; k < pieces.count; k++) all_squares += squares(i, k, mean);
        for (long k = 0; k < pieces.count; k++) normalise(i, k, mean, all_squares);
    }

  private:
    template <class P>
    P at(P map, long image, long piece) const {
        return map + (image * pieces.positions + pieces.start(piece)) * pieces.channels;
    }
};

template <class T>
void group_norm(const GroupNorm<T>& norm, long batch, long threads) {
    if (batch >= threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (long i = 0; i < batch; i++) norm.image(i);
        return;
    }
    const long count = norm.pieces.count;
    const double size = double(norm.pieces.positions) * norm.pieces.channels;
    std::unique_ptr<double[]> parts(new (std::nothrow) double[2 * count]);
    if (!parts) {
        failed_allocations++;
        return;
    }
    double *sums = parts.get(), *squares = sums + count;
    for (long i = 0; i < batch; i++) {
        double mean = 0, all_squares = 0;
#pragma omp parallel for num_threads(threads)
        for (long k = 0; k < count; k++) sums[k] = norm.sum(i, k);
        for (long k = 0; k < count; k++) mean += sums[k] / size;
#pragma omp parallel for num_threads(threads)
        for (long k = 0; k < count; k++) squares[k] = norm.squares(i, k, mean);
        for (long k = 0; k < count; k++) all_squares += squares[k];
#pragma omp parallel for num_threads(threads)
        for (long k = 0; k < count; k++) norm.normalise(i, k, mean, all_squares);
    }
}

// y = x * gate(excite(reduce(mean of x))); y may be x.
template <class T>
void squeeze(const T* x, T* y, const Squeeze& q, long batch, long positions, long channels, long hidden, long threads) {
    const Pieces pieces(positions, channels);
    const long count = pieces.count;
    std::unique_ptr<float[]> totals(new (std::nothrow) float[batch * count * hidden]());
    if (!totals) {
        failed_allocations++;
        return;
    }
    const auto sums = [&](long image, long piece) { return totals.get() + (image * count + piece) * hidden; };
    const auto add = [&](long i, long k) {
        const T* own = x + (i * positions + pieces.start(k)) * channels;
        for (long c = 0; c < channels; c += LANES) {
            Vec sum{};
            for (long p = 0; p < pieces.size(k); p++) sum += load_some(own + p * channels + c, channels - c);
            store(sums(i, k) + c, sum);
        }
    };
    const auto find = [&](long i) {
        for (long k = 1; k < count; k++)
            for (long c = 0; c < hidden; c += LANES) store(sums(i, 0) + c, load(sums(i, 0) + c) + load(sums(i, k) + c));
        excite(q, hidden, positions, sums(i, 0));
    };
    const auto scale = [&](long i, long k) {
        const long start = (i * positions + pieces.start(k)) * channels;
        for (long p = start; p < start + pieces.size(k) * channels; p += channels)
            for (long c = 0; c < channels; c += LANES)
                store_some(y + p + c, load_some(x + p + c, channels - c) * load(sums(i, 0) + c), channels - c);
    };
    if (batch >= threads) {  // one image after the other stays in a core's cache
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (long i = 0; i < batch; i++) {
            for (long k = 0; k < count; k++) add(i, k);
            find(i);
            for (long k = 0; k < count; k++) scale(i, k);
        }
        return;
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long i = 0; i < batch * count; i++) add(i / count, i % count);
#pragma omp for
        for (long i = 0; i < batch; i++) find(i);
#pragma omp for
        for (long i = 0; i < batch * count; i++) scale(i / count, i % count);
    }
}

struct Pool {
    long batch, height, width, channels, down, across;  // the last two are the output's height and width
    long size, stride, above, before;                   // of windows; rows and columns of padding
};

// The larger of each two; NaN where either is.
inline Vec largest_of(Vec x, Vec y) {
    const Bits takes = (y > x) | (y != y);
    return takes ? y : x;
}

template <class T>
void max_pool(const T* x, T* y, const Pool& s, long threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < s.batch * s.down; row++) {
        const long first = row % s.down * s.stride - s.above;
        const long top = std::max<long>(first, 0), bottom = std::min(first + s.size, s.height);
        const T* image = x + row / s.down * s.height * s.width * s.channels;
        T* to = y + row * s.across * s.channels;
        for (long column = 0; column < s.across; column++, to += s.channels) {
            const long begin = column * s.stride - s.before;
            const long left = std::max<long>(begin, 0), right = std::min(begin + s.size, s.width);
            for (long c = 0; c < s.channels; c += LANES) {
                const long lanes = s.channels - c;
                Vec most = load_some(image + (top * s.width + left) * s.channels + c, lanes);
                for (long i = top; i < bottom; i++)
                    for (long j = left; j < right; j++)
                        most = largest_of(most, load_some(image + (i * s.width + j) * s.channels + c, lanes));
                store_some(to + c, most, lanes);
            }
        }
    }
}

// y = (x - mean) / sqrt(variance + eps) * scale + shift with the mean and the variance of each position; y may be x.
template <class T>
void layer_norm(const T* x, T* y, const float* scale, const float* shift, float eps, long positions, long channels, long threads) {
    const long each = std::max<long>(1, PIECE / channels);
#pragma omp parallel for num_threads(threads)
    for (long start = 0; start < positions; start += each)
        for (long i = start; i < std::min(positions, start + each); i++) {
            const T* from = x + i * channels;
            const float mean = summed(from, channels, [](Vec v) { return v; }) / channels;
            const double squares = summed(from, channels, [=](Vec v) { return (v - mean) * (v - mean); });
            const float factor = 1 / std::sqrt(squares / channels + eps);
            for (long c = 0; c < channels; c += LANES) {
                const long lanes = channels - c;
                const Vec value = (load_some(from + c, lanes) - mean) * factor;
                store_some(y + i * channels + c, value * load_some(scale + c, lanes) + load_some(shift + c, lanes), lanes);
            }
        }
}

// The mean of each patch's real positions, (batch, height, width, channels) -> (batch, ⌈height/down⌉, ⌈width/across⌉, channels).
template <class T>
void average_pool(const T* x, T* y, long batch, long height, long width, long channels, long down, long across, long threads) {
    const long rows = (height + down - 1) / down, columns = (width + across - 1) / across;
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < batch * rows; i++) {
        const long top = i % rows * down, bottom = std::min(top + down, height);
        const T* image = x + i / rows * height * width * channels;
        T* to = y + i * columns * channels;
        for (long left = 0; left < width; left += across, to += channels) {
            const long right = std::min(left + across, width);
            const float share = 1.0f / ((bottom - top) * (right - left));
            for (long c = 0; c < channels; c += LANES) {
                Vec sum{};
                for (long row = top; row < bottom; row++)
                    for (long column = left; column < right; column++)
                        sum += load_some(image + (row * width + column) * channels + c, channels - c);
                store_some(to + c, sum * share, channels - c);
            }
        }
    }
}

}  // namespace

#define PASSES(SUFFIX, T)                                                                                                     \
    extern "C" void group_norm_##SUFFIX(const T* x, const T* residual, T* y, const float* scale, const float* shift,        \
                                        const float* eps, const Activation* act, long batch, long positions, long channels, \
                                        long threads) {                                                                     \
        group_norm(GroupNorm<T>{x, residual, y, scale, shift, *eps, *act, Pieces(positions, channels)}, batch, threads);     \
    }                                                                                                                        \
    extern "C" void squeeze_##SUFFIX(const T* x, T* y, const Squeeze* q, long batch, long positions, long channels,         \
                                     long hidden, long threads) {                                                           \
        squeeze(x, y, *q, batch, positions, channels, hidden, threads);                                                     \
    }                                                                                                                        \
    extern "C" void max_pool_##SUFFIX(const T* x, T* y, const Pool* sizes, long threads) { max_pool(x, y, *sizes, threads); } \
    extern "C" void layer_norm_##SUFFIX(const T* x, T* y, const float* scale, const float* shift, const float* eps,          \
                                        long positions, long channels, long threads) {                                       \
        layer_norm(x, y, scale, shift, *eps, positions, channels, threads);                                                  \
    }                                                                                                                        \
    extern "C" void average_pool_##SUFFIX(const T* x, T* y, long batch, long height, long width, long channels, long down,  \
                                          long across, long threads) {                                                      \
        average_pool(x, y, batch, height, width, channels, down, across, threads);                                           \
    }

PASSES(fp32, float)
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
PASSES(bf16, bf16)
#endif
