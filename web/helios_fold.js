// Inputs that our nodes call advanced fold away on a canvas too, behind "Show Advanced" in the node's menu.
//
// The page (1.32 to 1.58) knows such widgets, but nobody tells it which they are: an input's `advanced` arrives in the
// widget's options, where Nodes 2.0 of newer pages alone looks for it. Values stay and are sent and saved as always.

import { app } from "../../scripts/app.js"

const ALWAYS_SHOWN = "Comfy.Node.AlwaysShowAdvancedWidgets" // a setting of newer pages
const NO_ROW = () => [0, -4] // takes back the gap of 4 that the page leaves below every widget

/** Fold advanced widgets while nothing is connected to their inputs: a link must end somewhere. */
function update(node, advanced) {
    for (const widget of advanced) {
        widget.advanced = node.inputs?.find(input => input.widget?.name === widget.name)?.link == null
    }
}

// Newer pages (1.58) keep the row of a widget that something is connected to, though they call it invisible.
const hasRow = (node, widget) => (node.isWidgetRowVisible ?? node.isWidgetVisible).call(node, widget)

/** Take no room while it is not drawn: the page leaves a row free for it. */
function hideRow(node, widget) {
    const { computeSize } = widget
    Object.defineProperty(widget, "computeSize", {
        configurable: true,
        get: () => (hasRow(node, widget) || node.collapsed ? computeSize : NO_ROW),
        set: value => Object.defineProperty(widget, "computeSize", { value, writable: true }), // by another pack
    })
}

app.registerExtension({
    name: "Helios.Fold",
    nodeCreated(node) {
        if (!node.comfyClass?.startsWith("Helios")) return
        if (app.extensionManager?.setting?.get(ALWAYS_SHOWN)) return
        const advanced = (node.widgets ?? []).filter(widget => widget.options?.advanced)
        if (!advanced.length) return
        const before = node.computeSize()[1]
        for (const widget of advanced) hideRow(node, widget)
        update(node, advanced)
        const { onConnectionsChange } = node
        node.onConnectionsChange = (...change) => {
            onConnectionsChange?.apply(node, change)
            update(node, advanced)
        }
        node.setSize([node.size[0], node.size[1] - before + node.computeSize()[1]])
    },
})
