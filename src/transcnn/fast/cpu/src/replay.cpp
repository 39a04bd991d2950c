// Calls of kernels in a row, each with the arguments that it had when they were recorded, but for addresses in maps.

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace {

constexpr std::size_t MOST = 24;  // arguments of a kernel

using Kernel = const void*;
using Word = intptr_t;  // every argument of a kernel: a size or an address
using Run = void (*)(Kernel, const Word*);

template <std::size_t... I>
void run(Kernel kernel, const Word* arguments, std::index_sequence<I...>) {
    reinterpret_cast<void (*)(decltype(Word(I))...)>(const_cast<void*>(kernel))(arguments[I]...);
}

template <std::size_t COUNT>
void run_with(Kernel kernel, const Word* arguments) {
    run(kernel, arguments, std::make_index_sequence<COUNT>());
}

template <std::size_t... I>
constexpr std::array<Run, sizeof...(I)> each_count(std::index_sequence<I...>) {
    return {run_with<I>...};
}

constexpr auto RUN = each_count(std::make_index_sequence<MOST + 1>());

struct Call {
    Kernel kernel;
    Word first, count;  // of its arguments among those of all calls
};

struct Address {
    Word argument, map, offset;  // which argument it is, and where in which map it points
};

}  // namespace

extern "C" long most_arguments() { return MOST; }

extern "C" void replay(const Call* calls, Word count, const Word* arguments, Word total, const Address* addresses, Word places,
                       const Word* maps) {
    std::vector<Word> own(arguments, arguments + total);  // others may replay the same calls meanwhile
    for (const Address* a = addresses; a < addresses + places; a++) own[a->argument] = maps[a->map] + a->offset;
    for (const Call* call = calls; call < calls + count; call++) RUN[call->count](call->kernel, own.data() + call->first);
}
