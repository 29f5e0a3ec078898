"""A stand-in for vLLM 0.33.0 of what the plugin touches: names, parameters and schemas are its, the code is not."""

# SPDX-License-Identifier: Apache-2.0
