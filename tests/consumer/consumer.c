// A user of the C ABI: two tokens, two heads of 8, float32, in place, compared with the formula; then a bad call.
// SPDX-License-Identifier: Apache-2.0
#include <ropewalk/ropewalk.h>

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { kTokens = 2, kHeads = 2, kHeadDim = 8 };

static int check(int held, const char* what) {
  if (!held) fprintf(stderr, "consumer.c: %s: %s\n", what, ropewalk_last_error());
  return held ? 0 : 1;
}

int main(void) {
  float data[kTokens][kHeads][kHeadDim];
  float before[kTokens][kHeads][kHeadDim];
  for (int t = 0; t < kTokens; ++t)
    for (int h = 0; h < kHeads; ++h)
      for (int i = 0; i < kHeadDim; ++i) data[t][h][i] = (float)(t + 1) * 0.5f + (float)h - (float)i * 0.25f;
  memcpy(before, data, sizeof data);

  int64_t shape[3] = {kTokens, kHeads, kHeadDim};
  int64_t strides[3] = {kHeads * kHeadDim, kHeadDim, 1};
  DLTensor q = {.data = data,
                .device = {.device_type = kDLCPU, .device_id = 0},
                .ndim = 3,
                .dtype = {.code = kDLFloat, .bits = 32, .lanes = 1},
                .shape = shape,
                .strides = strides};
  int64_t positions[kTokens] = {3, 1000000};
  int64_t positions_shape[1] = {kTokens};
  DLTensor pos = {.data = positions,
                  .device = {.device_type = kDLCPU, .device_id = 0},
                  .ndim = 1,
                  .dtype = {.code = kDLInt, .bits = 64, .lanes = 1},
                  .shape = positions_shape};

  ropewalk_frequencies* frequencies = NULL;
  int failed =
      check(ropewalk_frequencies_create(10000.0, kHeadDim, NULL, 0, &frequencies) == ROPEWALK_OK, "frequencies");

  ropewalk_rope_args args = ROPEWALK_ROPE_ARGS_INIT;
  args.q = &q;
  args.positions = &pos;
  args.frequencies = frequencies;
  failed += check(ropewalk_rope(&args, NULL) == ROPEWALK_OK, "rope");

  for (int t = 0; t < kTokens; ++t)
    for (int h = 0; h < kHeads; ++h)
      for (int i = 0; i < kHeadDim / 2; ++i) {
        const double angle = (double)positions[t] * pow(10000.0, -2.0 * i / kHeadDim);
        const double a = before[t][h][i], b = before[t][h][i + kHeadDim / 2];
        failed += check(fabs(data[t][h][i] - (a * cos(angle) - b * sin(angle))) < 1e-5, "first half");
        failed += check(fabs(data[t][h][i + kHeadDim / 2] - (b * cos(angle) + a * sin(angle))) < 1e-5, "second half");
      }

  args.rotary_dim = 7;
  failed += check(ropewalk_rope(&args, NULL) == ROPEWALK_INVALID_ARGUMENT, "an odd rotary_dim is refused");
  failed += check(strstr(ropewalk_last_error(), "rotary_dim") != NULL, "and the message names it");
  ropewalk_frequencies_release(frequencies);

  printf("consumer.c: Ropewalk %s, %d failed\n", ropewalk_version(), failed);
  return failed == 0 ? 0 : 1;
}
