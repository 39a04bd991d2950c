// Which dtypes the CPU's instruction set supports; asks Linux for permission to use AMX. And whether memory was lacking.

#include "vec.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Calls of kernels add to it that found no memory; what they computed is not whole.
extern "C" long allocations_that_failed() { return failed_allocations; }

// Bit 0: fp32, bit 1: bf16, bit 2: whose products sum over 32 numbers at a time, so that there are as many at least.
extern "C" long isa_support() {
#if defined(__AMX_BF16__)
    const long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 ? 7 : 1;
#elif defined(__AVX512BF16__)
    return 3;
#else
    return 1;
#endif
}
