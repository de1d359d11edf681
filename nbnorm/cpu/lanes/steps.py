"""Numba's compiler without the steps that change nothing in functions like ours: a first use takes 0.8 of the time.

In such a function nothing is closed over, raised, reported or of Python's objects, and no expression is of arrays. A name
has one type, and an argument that may be None keeps its value, since a step that tells apart what is assigned to a name is
left out too. Others only say what was done, or prepare what a later one prepares again.
"""

from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager

SKIPPED = {
    "AnnotateTypes",
    "DumpParforDiagnostics",
    "FindLiterallyCalls",
    "IRProcessing",
    "InlineClosureLikes",
    "InlineInlinables",
    "InlineOverloads",
    "LiteralPropagationSubPipelinePass",
    "LiteralUnroll",
    "MakeFunctionToJitFunction",
    "NoPythonSupportedFeatureValidation",
    "NopythonRewrites",
    "PreLowerStripPhis",
    "ReconstructSSA",
    "RewriteDynamicRaises",
    "WithLifting",
}


def compiler(skipped, replaced):
    """A class of compilers, for `njit`: Numba's without some steps, and with others in the place of some."""

    class Compiler(CompilerBase):
        def define_pipelines(self):
            steps = PassManager("nbnorm")
            for step, description in DefaultPassBuilder.define_nopython_pipeline(self.state).passes:
                if step.__name__ not in skipped:
                    steps.add_pass(replaced.get(step, step), description)
            steps.finalize()
            return [steps]

    return Compiler
