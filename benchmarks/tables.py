"""Saved results as Markdown tables, and those tables put between the markers of a Markdown file.

The markers are `<!-- compare -->` for everything or, say, `<!-- compare: forward float32 -->` for one table, and
`<!-- /compare -->`. The names of what was measured on a CUDA device begin with "CUDA", as in
`<!-- compare: CUDA machine -->`, and those of kernels for AVX2 with "AVX2"; a page may have all of these, of which each
rendering writes its own.
"""

import re

PEERS = ("NumPy", "torch", "torch.compile", "Triton", "Liger", "CuPy", "ONNX Runtime", "JAX")
# nbnorm's variants that are shown beside the limit
OF_THE_LIMIT = ("nbnorm out=", "difference of squares", "given statistics", "two steps")
# problems of up to this many elements have a table in microseconds: calls cost more than memory there
SMALL_ELEMENTS = 1 << 17
CUDA, AVX2 = "CUDA ", "AVX2 "
MARKED = re.compile(r"(<!-- compare(?:: (?P<name>[\w ]+))? -->\n)((?:(?!<!-- compare).)*?)(<!-- /compare -->)", re.DOTALL)


def tables(results):
    """A dict from the name of each table to its text; "machine" is the sentence that belongs to all of them."""
    prefix = prefix_of(results)
    is_cuda = prefix == CUDA
    texts = {f"{prefix}machine": cuda_machine(results) if is_cuda else machine(results)}
    for problem in results["problems"]:
        name = prefix + table_name(problem)
        if name not in texts:
            alike = [other for other in results["problems"] if table_name(other) == table_name(problem)]
            texts[name] = small_table(alike) if is_small(problem) else table(alike, peers_of(problem["pass"], results))
    if not is_cuda:
        texts[f"{prefix}peers float32"] = peers_table(results)
    return texts


def prefix_of(results):
    """What the names of these results' tables begin with."""
    if results.get("device") == "cuda":
        return CUDA
    return AVX2 if results["machine"].get("instructions") == "AVX2" else ""


def everything(texts):
    names = {name: name.removeprefix(kind_of(name)) for name in texts}
    titles = {name: "" if short == "machine" else f"{short[:1].upper()}{short[1:]}:\n\n" for name, short in names.items()}
    return "\n\n".join(titles[name] + text for name, text in texts.items())


def is_small(problem):
    return problem["rows"] * problem["cols"] <= SMALL_ELEMENTS


def table_name(problem):
    return f"{problem['pass']} {problem['dtype']}" + (" small" if is_small(problem) else "")


def peers_of(pass_, results):
    """Those that have the pass for any dtype: where one has none for this dtype, the column says so."""
    return [peer for peer in PEERS if any(peer in p["contestants"] for p in results["problems"] if p["pass"] == pass_)]


def machine(results):
    where = results["machine"]
    caches = "".join(f", {name} {size / (1 << 20):g} MiB" for name, size in where["cache_bytes"].items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    left_out = f" Left out, not installed: {', '.join(results['left_out'])}." if results["left_out"] else ""
    kept = " Freed memory is kept for the next call." if results["keep_memory"] else ""
    compiled = f"; kernels for {where['instructions']}" if "instructions" in where else ""
    return (
        f"Measured on {results['date']} with {results['threads']} threads on {where['cpu']} "
        f"({where['logical_cores']} logical cores{caches}{compiled}): {versions}.{kept}{left_out}"
    )


def cuda_machine(results):
    where = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    left_out = f" Left out, not installed: {', '.join(results['left_out'])}." if results["left_out"] else ""
    late = f" Left out for want of time: {', '.join(results['late'])}." if results["late"] else ""
    failed = f" Failed: {', '.join(results['failed'])}." if results["failed"] else ""
    return (
        f"Measured on {results['date']} on {where['gpu']} ({where['multiprocessors']} multiprocessors, "
        f"L2 {where['l2_bytes'] / (1 << 20):g} MiB, driver {where['driver']}; host {where['cpu']}): "
        f"{versions}.{left_out}{late}{failed}"
    )


def table(problems, peers):
    """The limit's bandwidth; `out=` as a fraction of its speed; how much faster the allocating call is than each peer's."""
    variants = [name for name in OF_THE_LIMIT if name in problems[0]["contestants"]]
    header = ["rows x columns", "limit, GB/s", *(f"{name}, of the limit" for name in variants)]
    header += [f"faster than {peer}" for peer in peers]
    rows = []
    for problem in problems:
        seconds = medians(problem)
        row = [shape(problem), f"{problem['bytes'] / seconds['limit'] / 1e9:.1f}"]
        row += [f"{seconds['limit'] / seconds[name]:.2f}" for name in variants]
        row += [f"{digits(seconds[peer] / seconds['nbnorm'])}x" if peer in seconds else "-" for peer in peers]
        rows.append(row)
    return markdown(header, rows)


def peers_table(results):
    """How much faster the allocating call is than each peer's: the least and the most of the large problems."""
    rows = []
    for peer in PEERS:
        row = [peer]
        for pass_ in ("forward", "backward"):
            timed = [
                medians(problem)
                for problem in results["problems"]
                if (problem["pass"], problem["dtype"]) == (pass_, "float32") and not is_small(problem)
            ]
            ratios = [seconds[peer] / seconds["nbnorm"] for seconds in timed if peer in seconds]
            row.append(f"{digits(min(ratios))} to {digits(max(ratios))}x" if ratios else "-")
        if set(row[1:]) != {"-"}:
            rows.append(row)
    return markdown(["faster than", "forward", "backward"], rows)


def small_table(problems):
    """Microseconds of everybody."""
    names = list(problems[0]["contestants"])
    rows = []
    for problem in problems:
        seconds = medians(problem)
        rows.append([shape(problem), *(digits(1e6 * seconds[name]) if name in seconds else "-" for name in names)])
    return markdown(["rows x columns, us", *names], rows)


def shape(problem):
    return f"{problem['rows']} x {problem['cols']}"


def medians(problem):
    return {name: timing["median"] for name, timing in problem["contestants"].items()}


def digits(value):
    """At least two significant digits, and no exponent."""
    return f"{value:.{2 if value < 1 else 1 if value < 100 else 0}f}"


def markdown(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rewrite(path, texts):
    """Put the tables between the markers of a file, and leave the rest of it as it is."""
    old = path.read_text(encoding="utf-8")
    marked = list(MARKED.finditer(old))
    if not marked or len(marked) != old.count("<!-- compare"):
        raise SystemExit(f"{path}: expected <!-- compare --> and <!-- /compare --> in pairs, each on a line of its own")
    # of another kind
    kept = {match["name"] for match in marked if match["name"] and kind_of(match["name"]) != kind_of(next(iter(texts)))}
    unknown = {match["name"] for match in marked} - {None, *texts} - kept
    if unknown:
        raise SystemExit(f"{path}: no table {', '.join(sorted(unknown))}; the results have {', '.join(texts)}")

    def written(match):
        if match["name"] in kept:
            return match[0]
        return f"{match[1]}{everything(texts) if match['name'] is None else texts[match['name']]}\n{match[4]}"

    path.write_text(MARKED.sub(written, old), encoding="utf-8")


def kind_of(name):
    return next((kind for kind in (CUDA, AVX2) if name.startswith(kind)), "")
