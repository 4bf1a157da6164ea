// What a node has said stays on it when the run has ended, though newer pages (1.58) take it away then, and comes back
// with its workflow. It is on the subgraphs around the node too. The page itself writes on nodes of the graph that is
// open, whichever workflow runs.

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

const NOTHING = "\u2060" // takes back what was said
const WIDGET = "$$node-text-preview" // the page's own
const NO_ID = "00000000-0000-0000-0000-000000000000" // of every workflow that was made in an emptied graph
const WIDE = /[\u1100-\u11ff\u2e80-\ud7a3\uf900-\ufaff\uff01-\uff60]/g // letters as wide as two: Chinese, Japanese, Korean
const MOST = 240 // pixels of a note: the page scrolls longer ones
const notes = new Map() // by the id of a workflow: by the node's ids for the server, what it has said and in which run
const workflows = new Map() // by the id of a run that was queued here: that of its workflow
const written = new WeakSet() // widgets of notes
let running // the run that began last

const rootGraph = () => app.rootGraph ?? app.graph
const isOurs = node => node?.comfyClass?.startsWith("Helios")
const widgetOf = node => node.widgets?.find(widget => widget.name === WIDGET)

function notesOfRun() {
    const workflow = workflows.get(running) ?? rootGraph().id
    if (!notes.has(workflow)) notes.set(workflow, new Map())
    return notes.get(workflow)
}

/** By node of the open graph: what it, or nodes within it, have said. */
function textsToShow() {
    const texts = new Map()
    for (const [ids, { text }] of notes.get(rootGraph().id) ?? []) {
        let graph = rootGraph()
        let node, shown
        // The ids of the subgraphs around a node come first.
        for (const id of ids.split(":")) {
            node = graph?.getNodeById(id)
            if (graph === app.canvas.graph) shown = node
            graph = node?.subgraph
        }
        if (shown && isOurs(node)) texts.set(shown, (texts.get(shown) ?? new Set()).add(text))
    }
    return texts
}

/** Room for all of a note: the page has some two lines for it, and hides the rest. */
function makeRoom(node, widget) {
    const [letter, line, beside, above] = [6, 16, 52, 42] // pixels of its text, and around it
    const letters = text => text.length + (text.match(WIDE)?.length ?? 0)
    const lines = text => Math.max(1, Math.ceil((letters(text) * letter) / Math.max(letter, node.size[0] - beside)))
    const height = () => above + line * widget.value.split("\n").reduce((sum, text) => sum + lines(text), 0)
    widget.options.getMinHeight = () => Math.min(MOST, height())
}

function remove(node) {
    const widget = widgetOf(node)
    if (!widget) return
    node.removeWidget(widget)
    if (widgetOf(node) !== widget) return
    widget.onRemove?.() // a subgraph has kept it (1.45)
    node.widgets.splice(node.widgets.indexOf(widget), 1)
}

/** Have the nodes of the open graph say that and no more. anew: older pages (1.32) no longer draw what is there. */
function write(anew) {
    const texts = textsToShow()
    for (const node of app.canvas.graph.nodes) {
        const mayRemove = isOurs(node) || written.has(widgetOf(node)) // what others say on a subgraph is theirs
        if (mayRemove && (anew || !texts.has(node))) remove(node)
        if (!texts.has(node)) continue
        const text = [...texts.get(node)].join("\n")
        // An id alone is of the open graph.
        const detail = { nodeId: String(node.id), text, again: true }
        if (widgetOf(node)?.value !== text) api.dispatchCustomEvent("progress_text", detail)
        const widget = widgetOf(node)
        if (!widget) continue
        widget.serialize = false // older pages would save it as one more value
        makeRoom(node, widget)
        written.add(widget)
    }
}

const writeSoon = anew => setTimeout(() => write(anew)) // after the page

function listen() {
    api.addEventListener("progress_text", ({ detail: { nodeId, text, again } }) => {
        if (again) return
        if (text === NOTHING) notesOfRun().delete(String(nodeId))
        else notesOfRun().set(String(nodeId), { text, run: running })
        writeSoon()
    })
    api.addEventListener("executing", ({ detail: nodeId }) => {
        if (notesOfRun().get(String(nodeId))?.run === running) return // told again on a connection that was made again
        // What it said before: the server may have taken that back from a node of its number in another workflow.
        if (notesOfRun().delete(String(nodeId))) writeSoon()
    })
    api.addEventListener("execution_start", ({ detail }) => {
        running = detail.prompt_id
    })
    for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
        api.addEventListener(end, () => writeSoon())
    }
    api.addEventListener("graphCleared", () => notes.delete(NO_ID))
    app.canvas.canvas.addEventListener("litegraph:set-graph", () => writeSoon(true))
}

const { queuePrompt } = api
api.queuePrompt = async function (number, prompt, ...more) {
    const answer = await queuePrompt.call(this, number, prompt, ...more)
    workflows.set(answer?.prompt_id, prompt.workflow?.id)
    return answer
}

app.registerExtension({
    name: "Helios.Notes",
    setup: listen,
    afterConfigureGraph() {
        notes.delete(NO_ID)
        writeSoon()
    },
})
