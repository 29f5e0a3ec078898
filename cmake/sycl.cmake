# The shims for SYCL queues (backends/intel/sycl/shim.h): one library for each libsycl whose headers are found, compiled by the
# plain C++ compiler. Nothing links them: Ropewalk opens one when a queue is handed over. Without the headers there is
# none, and `ropewalk doctor` says so.
# SPDX-License-Identifier: Apache-2.0

# Where include/sycl and lib/libsycl.so.N are: scripts/setup.sh puts the packages intel-sycl-rt of both versions there.
set(ROPEWALK_SYCL_ROOTS "${PROJECT_SOURCE_DIR}/.venv/sycl/9;${PROJECT_SOURCE_DIR}/.venv/sycl/8;$ENV{CMPLR_ROOT}"
  CACHE STRING "Folders with SYCL's include/ and lib/, for queues of that SYCL")

# Ropewalk looks for a shim beside itself.
set(ropewalk_sycl_dir ${PROJECT_BINARY_DIR})
if(ROPEWALK_PYTHON)
  set(ropewalk_sycl_dir ${PROJECT_BINARY_DIR}/python/ropewalk)
endif()
set(ropewalk_sycl_shims "")
foreach(version 9 8)  # of libsycl: 9 is that of the compilers of 2026, 8 of 2025
  foreach(root IN LISTS ROPEWALK_SYCL_ROOTS)
    if(TARGET ropewalk_sycl${version} OR NOT EXISTS ${root}/include/sycl/sycl.hpp OR
       NOT EXISTS ${root}/lib/libsycl.so.${version} OR NOT CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
      continue()
    endif()
    add_library(ropewalk_sycl${version} MODULE backends/intel/sycl/shim.cc)
    target_include_directories(ropewalk_sycl${version} PRIVATE ${PROJECT_SOURCE_DIR})
    target_include_directories(ropewalk_sycl${version} SYSTEM PRIVATE ${root}/include ${root}/include/sycl)
    target_compile_definitions(ropewalk_sycl${version} PRIVATE
      SYCL_DISABLE_FSYCL_SYCLHPP_WARNING ROPEWALK_LIBSYCL="libsycl.so.${version}")
    # By name and not by path, so that the process's own libsycl serves, wherever it lies. What that one needs is not here.
    # Our warnings, but the libstdc++ that libsycl throws its exceptions with.
    target_compile_options(ropewalk_sycl${version} PRIVATE $<TARGET_PROPERTY:ropewalk_flags,INTERFACE_COMPILE_OPTIONS>)
    target_link_options(ropewalk_sycl${version} PRIVATE -L${root}/lib LINKER:--allow-shlib-undefined)
    target_link_libraries(ropewalk_sycl${version} PRIVATE -l:libsycl.so.${version})
    set_target_properties(ropewalk_sycl${version} PROPERTIES
      LIBRARY_OUTPUT_DIRECTORY ${ropewalk_sycl_dir} PREFIX lib BUILD_WITH_INSTALL_RPATH TRUE INSTALL_RPATH "")
    list(APPEND ropewalk_sycl_shims ropewalk_sycl${version})
    set(ropewalk_sycl${version}_root ${root})
  endforeach()
endforeach()
if(NOT ropewalk_sycl_shims)
  message(STATUS "Without SYCL queues: no SYCL headers in ${ROPEWALK_SYCL_ROOTS} (scripts/setup.sh sycl installs them)")
elseif(SKBUILD)
  install(TARGETS ${ropewalk_sycl_shims} LIBRARY DESTINATION ropewalk)
else()
  install(TARGETS ${ropewalk_sycl_shims} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
