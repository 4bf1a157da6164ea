// Inputs that our nodes call advanced fold away on a canvas too, behind "Show Advanced" in the node's menu.
//
// The page (1.32 to 1.49) knows such widgets, but nobody tells it which they are: an input's `advanced` arrives in the
// widget's options, where Nodes 2.0 of newer pages alone looks for it. Values stay and are sent and saved as always.

import { app } from "../../scripts/app.js"

const ALWAYS_SHOWN = "Comfy.Node.AlwaysShowAdvancedWidgets" // a setting of newer pages
const NO_ROW = () => [0, -4] // takes back the gap of 4 that the page leaves below every widget

/** A property that is computed until somebody, such as another pack, sets it. */
function derive(widget, name, get) {
    const set = value => Object.defineProperty(widget, name, { value, writable: true })
    Object.defineProperty(widget, name, { configurable: true, get, set })
}

/** Fold this widget while nothing is connected to its input: a link must end somewhere. */
function fold(node, widget) {
    const { computeSize } = widget
    derive(widget, "advanced", () => node.inputs?.find(input => input.widget?.name === widget.name)?.link == null)
    // The page leaves a row free for what it does not draw.
    derive(widget, "computeSize", () => (node.isWidgetVisible(widget) || node.collapsed ? computeSize : NO_ROW))
}

app.registerExtension({
    name: "Helios.Fold",
    nodeCreated(node) {
        if (!node.comfyClass?.startsWith("Helios")) return
        if (app.extensionManager?.setting?.get(ALWAYS_SHOWN)) return
        const advanced = (node.widgets ?? []).filter(widget => widget.options?.advanced)
        if (!advanced.length) return
        const before = node.computeSize()[1]
        for (const widget of advanced) fold(node, widget)
        node.setSize([node.size[0], node.size[1] - before + node.computeSize()[1]])
    },
})
