// What these kernels can compute in on this processor, and the system's leave to use its matrix tiles.

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// 1: fp32 alone; 3: bf16, too.
extern "C" long kinds() {
#if defined(__AMX_BF16__)
    const long ask_for = 0x1023, matrix_tiles = 18;
    return syscall(SYS_arch_prctl, ask_for, matrix_tiles) == 0 ? 3 : 1;
#elif defined(__AVX512BF16__)
    return 3;
#else
    return 1;
#endif
}
