// What a node says stays on it when a run has ended: newer pages (1.58) take it away then.

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

const NOTHING = "\u2060" // takes back what was said
const WIDGET = "$$node-text-preview" // the page's own
const notes = new Map() // by the node's ids for the server: the node, and what it said last

/** The node with these ids, where those of the subgraphs around it come first. */
function find(ids) {
    let node
    let graph = app.rootGraph ?? app.graph
    for (const id of ids.split(":")) {
        node = graph?.getNodeById(id)
        graph = node?.subgraph
    }
    return node
}

api.addEventListener("progress_text", ({ detail: { nodeId, text } }) => {
    const ids = String(nodeId)
    const node = find(ids)
    if (!node?.comfyClass?.startsWith("Helios")) return
    if (text === NOTHING) notes.delete(ids)
    else notes.set(ids, { node, text })
})

/** Where the page has taken a note away; it looks for nodes in the graph that is open, and shows only those of that. */
function putBack() {
    for (const [nodeId, { node, text }] of notes) {
        if (find(nodeId) !== node) notes.delete(nodeId) // it was removed, or another workflow is open
        else if (node.graph === app.canvas.graph && !node.widgets?.some(widget => widget.name === WIDGET)) {
            api.dispatchCustomEvent("progress_text", { nodeId, text })
        }
    }
}

for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
    api.addEventListener(end, () => setTimeout(putBack)) // after the page
}
