"""Variables of the environment."""


# SPDX-License-Identifier: Apache-2.0
class Variable:
    def get(self):
        return False


class envs:  # noqa: N801
    SGLANG_ENABLE_DETERMINISTIC_INFERENCE = Variable()
