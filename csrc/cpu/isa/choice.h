// Which instruction set runs: a function of what was asked for, what the machine has and what was compiled in.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

namespace moetrain::isa {

using Names = std::vector<std::string>;

inline bool holds(const Names& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

// Names of the machine's that are compiled in, best first.
inline Names usable_of(const Names& machine, const Names& built) {
    Names usable;
    for (const std::string& isa : machine)
        if (holds(built, isa)) usable.push_back(isa);
    return usable;
}

inline std::string joined(const Names& names) {
    std::string list;
    for (const std::string& name : names)
        list += (list.empty() ? "" : ", ") + name;
    return list;
}

struct Choice {
    std::string isa;
    std::string refusal;  // empty, or why there is no choice
};

// `wanted` is MOETRAIN_CPU_ISA; empty: the best.
inline Choice choose(const std::string& wanted, const Names& machine, const Names& built) {
    const Names usable = usable_of(machine, built);
    if (wanted.empty()) return {usable.front(), ""};
    if (wanted != "amx_emulated" && !holds(machine, wanted))
        return {"", "moetrain: MOETRAIN_CPU_ISA must be one of " + joined(machine) +
                        " (what this machine has) or amx_emulated, got " + wanted + "; unset it to use the best"};
    if (!holds(built, wanted))
        return {"", "moetrain: MOETRAIN_CPU_ISA must be one of " + joined(usable) +
                        " (what this machine has and this build was compiled for), got " + wanted +
                        "; unset it, or build again with MOETRAIN_BUILD_ISA=all or MOETRAIN_BUILD_ISA=" + wanted};
    return {wanted, ""};
}

}  // namespace moetrain::isa
