"""Programs that are one attention, as passes that replace attentions see it."""

from __future__ import annotations

from thresher.ir.parser import parse
from thresher.ir.program import Program


def site(rows: int = 64, keys: int = 64, rest: str = "", heads: int = 2, shared: int = 2) -> Program:
    """Return an attention of ``heads`` heads over ``shared`` heads of keys.

    ``rest`` are its further arguments; %keys is a mask of keys, %pairs one of queries and keys, both constant.
    """
    masks = {
        "%keys": f'%keys = constant "keys" : f32[1, 1, 1, {keys}]',
        "%pairs": f'%pairs = constant "pairs" : f32[1, 1, {rows}, {keys}]',
    }
    return parse(
        f"""
        %q = input : f32[1, {heads}, {rows}, 4]
        %k = input : f32[1, {shared}, {keys}, 4]
        {next((line for name, line in masks.items() if name in rest), "")}
        %y = aten.scaled_dot_product_attention.default(%q, %k, %k{rest}) : f32[1, {heads}, {rows}, 4]
        return [%y]"""
    )
