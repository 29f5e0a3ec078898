// Polynomials for the cosine and sine up to an eighth of a turn, of every kernel: x + x^3 (SIN3 + SIN5 x^2 + ..) and
// 1 - x^2/2 + x^4 (COS4 + ..). Least largest error, coefficients rounded to float32. Read by g++, NVRTC and OpenCL C.
// SPDX-License-Identifier: Apache-2.0
#ifndef ROPEWALK_ROPE_SINCOS_H_
#define ROPEWALK_ROPE_SINCOS_H_

#define ROPE_SIN3 (-0.16666650772f)
#define ROPE_SIN5 0.0083319786936f
#define ROPE_SIN7 (-0.00019495635934f)
#define ROPE_COS4 0.041666645557f
#define ROPE_COS6 (-0.0013887367677f)
#define ROPE_COS8 2.4438451874e-05f
#define ROPE_ANGLE_OF_PHASE 1.46291807926715968e-9f  // 2 pi / 2^32

#endif  // ROPEWALK_ROPE_SINCOS_H_
