"""Whether and where a rotation may store; the walk gives its own."""

# SPDX-License-Identifier: Apache-2.0
