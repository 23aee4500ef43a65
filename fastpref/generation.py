"""Former name of `fastpref.sampling.generate`, kept for programs that import it."""

from fastpref.sampling.generate import Written as Written
from fastpref.sampling.generate import generate as generate
from fastpref.sampling.generate import write as write
