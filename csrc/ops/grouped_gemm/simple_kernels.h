// The one warning of all operators that have simple kernels beside those for tensor cores.
#pragma once
#include <string>

namespace moetrain {

// Warns that `op` runs its simple kernels for lack of what `obstacle` says: once in a program, whatever the operator.
void warn_of_simple_kernels(const char* op, const std::string& obstacle);

// That warning comes no more: who calls these operators has said as much.
void quieten_simple_kernels();

}  // namespace moetrain
