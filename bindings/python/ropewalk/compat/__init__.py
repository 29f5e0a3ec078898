"""Functions of other projects under their own names and arguments, each a few lines over `ropewalk.rope_`.

`ropewalk.compat.sglang_jit` stands in for SGLang's kernels compiled at run time, `ropewalk.compat.sgl_kernel` for those
of the sgl_kernel package for CUDA, `ropewalk.compat.sgl_kernel_xpu` for that for Intel GPUs; `flashinfer`, `vllm`,
`flash_attn`, `liger`, `transformer_engine`, `rotary`, `diffusers` and `transformers` beside them have functions of
those. docs/compat.md says what differs. They need torch.
"""

# SPDX-License-Identifier: Apache-2.0
