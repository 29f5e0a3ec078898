# Cross-building for aarch64 with Debian's compiler; programs run under qemu.
# SPDX-License-Identifier: Apache-2.0
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
find_program(aarch64_c NAMES aarch64-linux-gnu-gcc aarch64-linux-gnu-gcc-12 REQUIRED)
find_program(aarch64_cxx NAMES aarch64-linux-gnu-g++ aarch64-linux-gnu-g++-12 REQUIRED)
find_program(aarch64_qemu NAMES qemu-aarch64-static qemu-aarch64 REQUIRED)
set(CMAKE_C_COMPILER ${aarch64_c})
set(CMAKE_CXX_COMPILER ${aarch64_cxx})
set(CMAKE_CROSSCOMPILING_EMULATOR ${aarch64_qemu};-L;/usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
