#include "dispatch.hpp"

#include <cstdlib>
#include <stdexcept>

namespace sparsefold {

const std::vector<std::string>& available_isas() {
    static const std::vector<std::string> isas = [] {
        std::vector<std::string> found;
#ifdef SPARSEFOLD_X86
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi2"))
                found.push_back("avx512vnni");
            found.push_back("avx512");
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
#endif
#ifdef SPARSEFOLD_ARM64
        found.push_back("neon");  // part of every 64-bit Arm processor
#endif
        found.push_back("generic");
        return found;
    }();
    return isas;
}

bool intel() {
#ifdef SPARSEFOLD_X86
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

const Kernels& kernels(const std::string& isa, std::string* chosen) {
    std::string name = isa;
    if (name.empty()) {
        const char* wanted = std::getenv("SPARSEFOLD_ISA");
        name = wanted && *wanted ? wanted : available_isas().front();
    }
    std::string list;
    for (const std::string& each : available_isas()) {
        list += (list.empty() ? "" : ", ") + each;
        if (each != name) continue;
        if (chosen) *chosen = name;
#ifdef SPARSEFOLD_X86
        if (name == "avx512vnni") return kernels_avx512vnni;
        if (name == "avx512") return kernels_avx512;
        if (name == "avx2") return kernels_avx2;
#endif
#ifdef SPARSEFOLD_ARM64
        if (name == "neon") return kernels_neon;
#endif
        return kernels_generic;
    }
    throw std::invalid_argument("instruction set '" + name +
                                "' is not available on this processor, which has: " + list +
                                ". Choose one of these (isa=, or SPARSEFOLD_ISA), or leave it out for the first.");
}

}  // namespace sparsefold
