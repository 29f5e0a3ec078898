"""A stand-in for SGLang 0.5.23 of what the plugin touches: names and parameters are its, the code is not."""

# SPDX-License-Identifier: Apache-2.0
