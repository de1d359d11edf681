"""What a call in compiled code is: an instruction, since it needs what Numba's language lacks.

A user's compiled function may be on disk, and outlive the nbnorm that it was compiled with. So it knows no kernel and no
size. It knows a request, which says what kind of call it makes, and asks `served`, in whichever process it runs, for the
table of that request: once for each place that calls. In a table are addresses: of a function that nbnorm has compiled, and
of two of Python's.
"""

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import _empty_nd_impl

from nbnorm.nopython.roles import ARRAYS, BESIDE, EPS, FLAG, LIKE_X, ROW, SHAPE, USUAL_EPS, X, is_absent

I32, I64 = ir.IntType(32), ir.IntType(64)
# words of a table, after which come those that nbnorm's compiled function reads. What is compiled for users knows these, and
# the arguments of what they lead to: where any of it is changed, requests have another VERSION
ENTRY, CHECK, RUN, KERNELS = range(4)
SERVED = "nbnorm.nopython.served"
NOT_SERVED = "nbnorm: not found, or of another version than this function was compiled with: delete the files of its cache"
# of a finite number that is not negative: told by its bits, whatever the fast-math flags of the user's function are
LARGEST_BITS = 0x7FEFFFFFFFFFFFFF
# what options are handed on as
NUMBERS = {EPS: types.float64, USUAL_EPS: types.float64, FLAG: types.boolean}
# what Python says of a call: nothing, or what to raise, with a message
FINE, VALUE, MEMORY, INTERRUPT, OTHER = range(5)
ERRORS = {VALUE: ValueError, MEMORY: MemoryError, INTERRUPT: KeyboardInterrupt, OTHER: RuntimeError}


class Operand(NamedTuple):
    role: str
    kind: types.Type
    value: Any


class Shapes(NamedTuple):
    """The sizes of a call."""

    x: list
    row: list

    @property
    def batch(self):
        return self.x[: len(self.x) - len(self.row)]

    def of(self, role):
        """That of an array with this role."""
        known = {X: self.batch + self.row, LIKE_X: self.x, BESIDE: self.x, ROW: self.row}
        return known.get(role, self.batch + [I64(1)] * len(self.row))


def calling(request, roles, results):
    """An instruction that makes a call of operands, and of what is given to write to, both tuples.

    `results` are the role and the type of each; it returns them as a tuple.
    """

    @intrinsic
    def call(typing_context, operands, outs):
        def codegen(context, builder, signature, args):
            given = _operands(builder, roles, operands, args[0])
            given_outs = _operands(builder, [role for role, _ in results[: len(outs)]], outs, args[1])
            shapes = _shapes(context, builder, given)
            table = _table(context, builder, request)
            with cgutils.if_unlikely(builder, builder.not_(_fits(context, builder, given + given_outs, shapes))):
                _ask(context, builder, table, CHECK, given + given_outs, given + given_outs)
            made = [
                _result(context, builder, role, kind, out, shapes)
                for (role, kind), out in zip(results, given_outs + [None] * (len(results) - len(outs)), strict=True)
            ]
            with cgutils.if_unlikely(builder, builder.not_(_run(context, builder, table, given + made, shapes))):
                _ask(context, builder, table, RUN, given + made, given + given_outs + made)
            return context.make_tuple(builder, signature.return_type, [result.value for result in made])

        return types.Tuple([kind for _, kind in results])(operands, outs), codegen

    return call


def _table(context, builder, request):
    """The address of the table of a request, asked for by the first call."""
    slot = cgutils.add_global_variable(builder.module, I64, builder.module.get_unique_name("nbnorm_table"))
    slot.linkage, slot.initializer = "internal", I64(0)
    with cgutils.if_unlikely(builder, builder.icmp_unsigned("==", builder.load(slot), I64(0))):
        python = context.get_python_api(builder)
        lock = python.gil_ensure()
        module = python.import_module(context.insert_const_string(builder.module, SERVED))
        text = context.insert_const_string(builder.module, request)
        asked = python.bytes_from_string_and_size(text, context.get_constant(types.intp, len(request)))
        address = python.call_method(module, "table", [asked])
        python.decref(module)
        python.decref(asked)
        with cgutils.if_unlikely(builder, cgutils.is_null(builder, address)):
            give_up(context, builder, python, lock, ImportError, NOT_SERVED)
        builder.store(python.long_as_longlong(address), slot)
        python.decref(address)
        python.gil_release(lock)
    return builder.load(slot)


def _fits(context, builder, operands, shapes):
    """Whether shapes and eps are right; what is wrong with them, Python says."""
    right = cgutils.true_bit
    for role, kind, value in operands:
        if role in (EPS, USUAL_EPS):
            bits = builder.bitcast(_number(context, builder, kind, value, types.float64), I64)
            right = builder.and_(right, builder.icmp_unsigned("<=", bits, I64(LARGEST_BITS)))
        elif role in ARRAYS and not is_absent(kind):
            for size, expected in zip(_shape(context, builder, kind, value), shapes.of(role), strict=True):
                right = builder.and_(right, builder.icmp_signed("==", size, expected))
    return right


def _result(context, builder, role, kind, out, shapes):
    """What is given for a result, or else a new array; nothing for one that is not asked for."""
    if is_absent(kind):
        return Operand(role, kind, context.get_dummy_value())
    if out is None or is_absent(out.kind):
        return Operand(role, kind, _empty_nd_impl(context, builder, kind, shapes.of(role))._getvalue())
    context.nrt.incref(builder, kind, out.value)
    return Operand(role, kind, out.value)


def _run(context, builder, table, operands, shapes):
    """Call the table's compiled function, and say whether it has done what was asked for."""
    sizes = _product(builder, shapes.batch), _product(builder, shapes.row)
    kinds: list[Any] = [types.int64] * 3
    values = [table, *sizes]
    for role, kind, value in operands:
        if role in NUMBERS:
            kinds.append(NUMBERS[role])
            values.append(_number(context, builder, kind, value, kinds[-1]))
        elif role != SHAPE:
            kinds.append(types.int64)
            values.append(_address(context, builder, kind, value))
    entry = word_of(builder, table, I64(ENTRY))
    is_done = cgutils.alloca_once_value(builder, cgutils.false_bit)
    with cgutils.if_likely(builder, builder.icmp_unsigned("!=", entry, I64(0))):
        builder.store(call_address(context, builder, entry, types.boolean(*kinds), values), is_done)
    return builder.load(is_done)


def _ask(context, builder, table, which, operands, owned):
    """Call one of the table's functions of Python, and raise what it says.

    Code that raises gives nothing back in Numba, so that what this call owns is given back here.
    """
    python = context.get_python_api(builder)
    # in no loop of `prange`, nor in a function that is compiled with nogil=True
    has_lock = builder.icmp_signed("!=", holds_lock(builder), I32(0))
    lock = python.gil_ensure()
    objects = [_boxed(context, builder, python, *operand) for operand in operands]
    objects.append(python.bool_from_bool(has_lock))
    told = python.call_function_objargs(builder.inttoptr(word_of(builder, table, I64(which)), python.pyobj), objects)
    for operand in objects:
        python.decref(operand)
    with cgutils.if_unlikely(builder, cgutils.is_null(builder, told)):
        give_up(context, builder, python, lock, RuntimeError, "nbnorm: interrupted")
    result = python.to_native_value(types.Tuple([types.int64, types.unicode_type]), told).value
    python.decref(told)
    python.gil_release(lock)
    fault, message = cgutils.unpack_tuple(builder, result)
    for number, error in ERRORS.items():
        with cgutils.if_unlikely(builder, builder.icmp_signed("==", fault, I64(number))):
            for _, kind, value in owned:
                context.nrt.decref(builder, kind, value)
            context.call_conv.return_dynamic_user_exc(builder, error, (message,), (types.unicode_type,))
    context.nrt.decref(builder, types.unicode_type, message)


def call_address(context, builder, address, signature, values):
    """Call what Numba has compiled for the signature, by its address."""
    kind = context.call_conv.get_function_type(signature.return_type, signature.args)
    function = builder.inttoptr(address, kind.as_pointer())
    status, result = context.call_conv.call_function(builder, function, signature.return_type, signature.args, values)
    with cgutils.if_unlikely(builder, status.is_error):
        context.call_conv.return_status_propagate(builder, status)
    return result


def holds_lock(builder):
    """Whether the calling thread has Python's lock, as an int32."""
    kind = ir.FunctionType(I32, [])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "PyGILState_Check"), [])


def word_of(builder, table, index):
    return builder.load(builder.gep(builder.inttoptr(table, I64.as_pointer()), [index]))


def give_up(context, builder, python, lock, error, message):
    """Raise it as compiled code does: an error of Python's own would be lost in a `try` of the user's."""
    python.err_write_unraisable(python.borrow_none())
    python.gil_release(lock)
    context.call_conv.return_user_exc(builder, error, (message,))


def _operands(builder, roles, kinds, values):
    return [Operand(*parts) for parts in zip(roles, kinds.types, cgutils.unpack_tuple(builder, values), strict=True)]


def _shapes(context, builder, operands):
    (x,) = (operand for operand in operands if operand.role == X)
    (row,) = (operand for operand in operands if operand.role == SHAPE)
    parts = _operands(builder, [SHAPE] * len(row.kind), *row[1:]) if isinstance(row.kind, types.BaseTuple) else [row]
    sizes = [_number(context, builder, part.kind, part.value, types.int64) for part in parts]
    return Shapes(_shape(context, builder, x.kind, x.value), sizes)


def _shape(context, builder, kind, value):
    return cgutils.unpack_tuple(builder, context.make_array(kind)(context, builder, value).shape, kind.ndim)


def _product(builder, sizes):
    product = I64(1)
    for size in sizes:
        product = builder.mul(product, size)
    return product


def _address(context, builder, kind, value):
    """Where an array is, 0 for an absent one."""
    return I64(0) if is_absent(kind) else builder.ptrtoint(context.make_array(kind)(context, builder, value).data, I64)


def _number(context, builder, kind, value, wanted):
    """An option, which may be a default, as a number of this type."""
    if isinstance(kind, types.Omitted):
        return context.get_constant(wanted, kind.value)
    return context.cast(builder, value, kind, wanted)


def _boxed(context, builder, python, role, kind, value):
    """An operand as an object of Python."""
    if is_absent(kind):
        return python.make_none()
    if role == SHAPE and isinstance(kind, types.BaseTuple):
        parts = _operands(builder, [SHAPE] * len(kind), kind, value)
        sizes = [_boxed(context, builder, python, *part) for part in parts]
        result = python.tuple_pack(sizes)
        for size in sizes:
            python.decref(size)
        return result
    if not isinstance(kind, types.Array):
        wanted = NUMBERS.get(role, types.int64)
        return python.from_native_value(wanted, _number(context, builder, kind, value, wanted))
    context.nrt.incref(builder, kind, value)
    return python.from_native_value(kind, value, context.get_env_manager(builder))
