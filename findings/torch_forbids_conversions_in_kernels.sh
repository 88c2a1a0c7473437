#!/usr/bin/env bash
# torch 2.13.0 and nvcc 13.5.37: CUDA sources of an extension.
#
# Guess: what nvcc compiles, torch.utils.cpp_extension (CUDAExtension, load) compiles.
# Seen:  it adds flags of its own, under which float = bf16 and half + half are errors in files that nvcc takes; and
#        they are uneven: half + half is forbidden, bf16 + bf16 is not.
# Here:  launch/native/ compiles kernels with nvcc directly, by the flags under which tests/cuda compiles them.
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0 nvidia-cuda-nvcc==13.5.37 nvidia-cuda-runtime==13.5.37 nvidia-cuda-crt==13.5.37 \
    nvidia-nvvm==13.5.37 nvidia-cuda-cccl==13.3.5.0.6
nvcc="$("$python" -c 'import nvidia, pathlib; print(next(pathlib.Path(nvidia.__path__[0]).glob("*/bin/nvcc")))')"
read -ra flags < <("$python" -c 'from torch.utils.cpp_extension import COMMON_NVCC_FLAGS as flags; print(*flags)')
echo "torch adds: ${flags[*]}"

# compiles NAME STATEMENT [FLAG...]
compiles() {
    {
        printf '#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n'
        printf '__global__ void kernel(__nv_bfloat16* b, __half* h, float* f) { %s }\n' "$2"
    } >"$folder/$1.cu"
    "$nvcc" -c -arch=sm_80 "${@:3}" "$folder/$1.cu" -o "$folder/$1.o" >"$folder/$1.log" 2>&1 && echo yes || echo no
}

right=1
while read -r expected name statement; do
    plain="$(compiles "$name" "$statement")"
    ours="$(compiles "$name" "$statement" "${flags[@]}")"
    echo "$statement plain nvcc: $plain; with torch's flags: $ours"
    [[ "$plain" == yes && "$ours" == "$expected" ]] || right=0
done <<'CASES'
no bf16_conversion f[0] = b[0];
no half_conversion f[0] = h[0];
no half_sum h[0] = h[1] + h[2];
yes bf16_sum b[0] = b[1] + b[2];
CASES
echo "guess: yes everywhere"
verdict test "$right" = 1
