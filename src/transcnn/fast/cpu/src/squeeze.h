// Squeeze-and-excitation of an image: the factors of its channels from their means.

#pragma once

#include "activations.h"

// 1x1 convolutions of an image's means: (hidden, squeezed), squeezed a multiple of LANES, and (squeezed, hidden).
struct Squeeze {
    const float *reduce, *reduce_bias, *expand, *expand_bias;
    long squeezed, images;  // so many images at a time
    Activation act, gate;
};

// The factors of an image's hidden channels, from the sums over its positions in ``gates``, which they are written over.
inline void excite(const Squeeze& q, long hidden, long positions, float* gates) {
    Scratch& memory = scratch();
    if (!memory.begin(q.squeezed * sizeof(float) + 64)) return;
    float* reduced = memory.take<float>(q.squeezed);
    const float share = 1.0f / positions;
    for (long r = 0; r < q.squeezed; r += LANES) {
        Vec sums[4] = {};
        for (long c = 0; c < hidden; c += 4)
            for (long k = 0; k < 4; k++) sums[k] += load(q.reduce + (c + k) * q.squeezed + r) * gates[c + k];
        const Vec sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * share + load(q.reduce_bias + r);
        q.act.with<float>([&](auto f) { store(reduced + r, f(sum)); });
    }
    for (long c = 0; c < hidden; c += LANES) {
        Vec sum = load(q.expand_bias + c);
        for (long r = 0; r < q.squeezed; r++) sum += load(q.expand + r * hidden + c) * reduced[r];
        q.gate.with<float>([&](auto f) { store(gates + c, f(sum)); });
    }
}
