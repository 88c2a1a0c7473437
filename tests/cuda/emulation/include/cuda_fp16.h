// fp16 for kernels under emulation: the compiler's own.
#pragma once

using __half = _Float16;
