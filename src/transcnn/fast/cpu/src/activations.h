// The activations that follow a convolution, chosen at run time for many vectors at a time.

#pragma once

#include "vec.h"

// Within 2e-7 of x·Φ(x), by an approximation of the error function (Abramowitz and Stegun, 7.1.26).
inline Vec gelu(Vec x) {
    const Vec size = as<Vec>(as<Bits>(x) & 0x7fffffff);
    const Vec t = inverse(size * 0.23164189f + 1.0f);
    Vec tail = t * 0.530702714f - 0.726576013f;
    tail = tail * t + 0.710706870f;
    tail = tail * t - 0.142248368f;
    tail = (tail * t + 0.127414796f) * t * exponential<float>(x * x * -0.5f);  // Φ(-|x|)
    return x > all(0.0f) ? x - x * tail : x * tail;
}

inline Vec clamp(Vec x, float low, float high) { return smaller(all(high), larger(all(low), x)); }  // NaN stays NaN

struct Activation {
    enum Kind : long { NONE, RELU, CLAMP, SILU, GELU, GELU_TANH, HARDSWISH, SIGMOID, HARDSIGMOID };

    long kind = NONE;
    float low = 0, high = 0;  // of CLAMP

    // Calls run(f) with f(x) the activation; T is the dtype that its precision is for.
    template <class T, class Run>
    void with(Run run) const {
        switch (kind) {
            case RELU: return run([](Vec x) { return larger(all(0.0f), x); });
            case CLAMP: return run([low = low, high = high](Vec x) { return clamp(x, low, high); });
            case SILU: return run([](Vec x) { return silu<T>(x); });
            case GELU: return run([](Vec x) { return gelu(x); });
            case GELU_TANH:
                return run([](Vec x) {
                    const Vec y = x * 1.59576912f * (x * x * 0.044715f + 1.0f);
                    return x * inverse(exponential<T>(-y) + 1.0f);
                });
            case HARDSWISH: return run([](Vec x) { return x * clamp(x + 3.0f, 0, 6) * (1 / 6.0f); });
            case SIGMOID: return run([](Vec x) { return inverse(exponential<T>(-x) + 1.0f); });
            case HARDSIGMOID: return run([](Vec x) { return clamp(x + 3.0f, 0, 6) * (1 / 6.0f); });
            default: return run([](Vec x) { return x; });
        }
    }
};
