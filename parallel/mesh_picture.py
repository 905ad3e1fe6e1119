"""The mesh drawn as a grid: one column a data rank, one row a place within a model, bars between expert groups."""

WIDTH = 100  # columns of a terminal
MOST_COLUMNS = 16  # data ranks shown of a large mesh
MOST_ROWS = 8
GAP = "..."


def draw(data: int, context: int, tensor: int, expert: int) -> str:
    """The ranks of `data * context * tensor`, and a line for each kind of group with more than one rank."""
    world = data * context * tensor
    cell = max(len(str(world - 1)), len(GAP)) + 2
    labels = {"data rank": [str(d) for d in range(data)]}
    if expert > 1:
        labels["expert part"] = [str(d % expert) for d in range(data)]
    places = [(c, t) for c in range(context) for t in range(tensor)]
    ranks = {
        _place(c, t, context, tensor): [str((d * context + c) * tensor + t) for d in range(data)] for c, t in places
    }
    names = [*labels, *ranks]
    margin = max(map(len, names)) + 2
    columns = _shown(data, expert, (WIDTH - margin - 1) // (cell + 1))
    lines = [_line(name, values, columns, expert, margin, cell) for name, values in labels.items()]
    lines.append(" " * margin + "-" * (len(lines[0]) - margin))
    rows = [_line(name, values, columns, expert, margin, cell) for name, values in ranks.items()]
    if len(rows) > MOST_ROWS:
        rows = [*rows[: MOST_ROWS - 1], f"{GAP:<{margin}}".rstrip(), rows[-1]]
    return "\n".join([_title(data, context, tensor, expert), *lines, *rows, *_legend(data, context, tensor, expert)])


def _title(data: int, context: int, tensor: int, expert: int) -> str:
    degrees = {"data": data, "context": context, "tensor": tensor}
    named = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1 or name == "data")
    shared = f"; experts over {expert}" if expert > 1 else ""
    world = data * context * tensor
    return f"mesh of {world} rank{'s' if world > 1 else ''}: {named}{shared}"


def _legend(data: int, context: int, tensor: int, expert: int) -> list[str]:
    lines = []
    if tensor > 1:
        which = "a column" if context == 1 else "in a column, those of one context rank"
        lines.append(f"tensor group ({tensor} ranks share every layer): {which}")
    if context > 1:
        which = "a column" if tensor == 1 else "in a column, those of one tensor rank"
        lines.append(f"context group ({context} ranks share a history): {which}")
    if data > 1:
        lines.append(f"data group ({data} ranks train different samples): a row")
    if expert > 1:
        between = "a row" if expert == data else "a row between two bars"
        lines.append(f"expert group ({expert} ranks share the experts): {between}")
    if 1 < expert < data:
        lines.append(
            f"expert data group ({data // expert} ranks hold the same experts): a row's cells of one expert part"
        )
    return lines


def _place(c: int, t: int, context: int, tensor: int) -> str:
    parts = [f"context {c}"] if context > 1 else []
    parts += [f"tensor {t}"] if tensor > 1 else []
    return ", ".join(parts) or "rank"


def _shown(data: int, expert: int, fitting: int) -> list[int | None]:
    """Data ranks to show; None stands for those left out. Whole expert groups where they fit."""
    most = min(fitting, MOST_COLUMNS)
    if data <= most:
        return list(range(data))
    last = expert if 2 * expert + 1 <= most else 1
    first = most - 1 - last
    if expert <= first:
        first -= first % expert
    return [*range(first), None, *range(data - last, data)]


def _line(name: str, values: list[str], columns: list[int | None], expert: int, margin: int, cell: int) -> str:
    line = f"{name:<{margin}}"
    for column in columns:
        starts_group = column is not None and expert > 1 and column % expert == 0
        line += ("|" if starts_group else " ") + f"{GAP if column is None else values[column]:>{cell - 1}} "
    return (line + "|" if expert > 1 else line).rstrip()
