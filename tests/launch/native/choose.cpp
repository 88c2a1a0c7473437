// choose WANTED MACHINE BUILT, lists separated by commas: prints the choice, or exits with 1 and prints the refusal.
#include <cstdio>

#include "cpu/isa/choice.h"

moetrain::isa::Names names_of(const std::string& list) {
    moetrain::isa::Names names;
    for (size_t begin = 0; begin <= list.size();) {
        const size_t end = std::min(list.find(',', begin), list.size());
        names.push_back(list.substr(begin, end - begin));
        begin = end + 1;
    }
    return names;
}

int main(int /*argc*/, char** argv) {
    const auto choice = moetrain::isa::choose(argv[1], names_of(argv[2]), names_of(argv[3]));
    std::puts(choice.refusal.empty() ? choice.isa.c_str() : choice.refusal.c_str());
    return choice.refusal.empty() ? 0 : 1;
}
