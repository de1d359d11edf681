"""The types of the language, and how Numba is taught an operation: what its result is, and the code that computes it."""

from numba import types
from numba.core.datamodel.models import PointerModel, PrimitiveModel, StructModel
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, register_model

from nbnorm.cpu.lanes.vectors import I1, I8, LLVM_TYPES, vector


class Lanes(types.Type):
    """Numba's type of sixteen float32 or float64."""

    def __init__(self, element):
        self.element = element
        super().__init__(name=f"Lanes({element})")


class Mask(types.Type):
    """Numba's type of sixteen booleans."""

    def __init__(self):
        super().__init__(name="Mask")


class Operand(types.CPointer):
    """Numba's type of an operand: of what is in memory, and of what that is read as."""

    def __init__(self, dtype, element):
        super().__init__(dtype)
        self.element = element
        self.name = f"Operand({dtype}, {element})"

    @property
    def key(self):
        return self.dtype, self.element


class Holder(types.CPointer):
    """Numba's type of a pointer to which only numbers are written that its type can hold."""

    def __init__(self, dtype):
        super().__init__(dtype)
        self.name = f"Holder({dtype})"


class Added(types.Type):
    """Numba's type of the sum of two operands, which is rounded to what the first is in memory."""

    def __init__(self, x, residual):
        self.x, self.residual = x, residual
        self.dtype, self.element = x.dtype, x.element
        super().__init__(name=f"Added({x}, {residual})")


class Column(types.Type):
    """Numba's type of those elements of an operand, or of a pointer, that are a pitch apart."""

    def __init__(self, source):
        self.source = source
        self.dtype, self.element = source.dtype, element_of(source)
        super().__init__(name=f"Column({source})")


@register_model(Column)
class ColumnModel(StructModel):
    def __init__(self, manager, column):
        super().__init__(manager, column, [("source", column.source), ("pitch", types.int64)])


@register_model(Added)
class AddedModel(StructModel):
    def __init__(self, manager, added):
        super().__init__(manager, added, [("x", added.x), ("residual", added.residual)])


@register_model(Lanes)
class LanesModel(PrimitiveModel):
    def __init__(self, manager, lanes_type):
        super().__init__(manager, lanes_type, vector(LLVM_TYPES[lanes_type.element]))


@register_model(Mask)
class MaskModel(PrimitiveModel):
    def __init__(self, manager, mask_type):
        super().__init__(manager, mask_type, vector(I1))


register_model(Operand)(PointerModel)
register_model(Holder)(PointerModel)
MASK = Mask()


def element_of(source):
    """The type that the elements of an operand, or of any other pointer, are read as."""
    return source.element if isinstance(source, Operand | Added | Column) else source.dtype


def lowers(function):
    """Decorate a rule: from the types of the arguments to the type of the result, and the code that computes it.

    None for arguments that are not ours.
    """

    def register(rule):
        def result(*argument_types):
            answer = rule(*argument_types)
            return answer[0] if answer else None

        types_call(function, result)

        @lower_builtin(function, types.VarArg(types.Any))
        def lower(context, builder, typed, arguments):
            return rule(*typed.args)[1](builder, *arguments)

        return rule

    return register


def types_call(function, result):
    """Tell Numba the type of a call's result, from those of its arguments; None for arguments that are not ours.

    Not by `type_callable`, which looks at signatures in every call, nor after Numba's own rules for an operator, which take
    longer to fail than ours to succeed: without both, a first use takes 0.9 of the time.
    """

    class Template(AbstractTemplate):
        key = function
        # before what is for any target
        metadata = {"target": "cpu"}  # noqa: RUF012

        def generic(self, args, kws):
            result_type = result(*args)
            return result_type and signature(result_type, *args)

    infer_global(function, types.Function(Template))


def returning_none(code):
    def wrapped(builder, *arguments):
        code(builder, *arguments)
        return I8.as_pointer()(None)

    return wrapped


NOTHING = types.none, returning_none(lambda builder, *arguments: None)
