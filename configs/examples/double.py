class Solution:
    """An example for `sdzero judge`."""

    def double(self, numbers: list[int]) -> list[int]:
        return [2 * number for number in numbers]
