# Written by `make docs`; a test checks that it is current.

from flexctl.tracing.building import Built as Built
from flexctl.tracing.building import build_index as build_index
from flexctl.tracing.building import require_divsufsort as require_divsufsort
from flexctl.tracing.near import near_spans as near_spans
from flexctl.tracing.near import require_rapidfuzz as require_rapidfuzz
from flexctl.tracing.spans import Place as Place
from flexctl.tracing.spans import Span as Span
from flexctl.tracing.spans import Traced as Traced
from flexctl.tracing.spans import copied as copied
from flexctl.tracing.spans import find_spans as find_spans
from flexctl.tracing.spans import segments as segments
