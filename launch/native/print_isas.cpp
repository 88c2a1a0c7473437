// Prints the instruction sets of this machine, as the kernels' own choice finds them; see isas.py.
#include <cstdio>

#include "cpu/isa/machine.h"

int main() {
    for (const std::string& isa : moetrain::isa::find_isas())
        std::puts(isa.c_str());
}
