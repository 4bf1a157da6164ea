// Helios Stream Video with `live` on: the video plays on its node while it is made.

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { feed } from "./helios_feed.js"
import { Steering } from "./helios_steer.js"
import { words } from "./helios_words.js"

const NODE = "HeliosStreamVideo"
const POLL = 1000 // milliseconds
const HEIGHT = 240 // pixels
const LATE = 2 // chunks; who comes later begins with the newest one

/**
 * Every player with its node's ids for the server, where those of the subgraphs around it come first: more than one
 * where a subgraph is used more than once.
 */
function playersWithIds(graph, path = "", found = new Map()) {
    for (const node of graph?.nodes ?? []) {
        if (node.subgraph) playersWithIds(node.subgraph, `${path}${node.id}:`, found)
        const player = players.get(node)
        if (player) found.set(player, [...(found.get(player) ?? []), `${path}${node.id}`])
    }
    return found
}

let plainOnly = false // MediaSource was tried, and the video refused it

const rootGraph = () => app.rootGraph ?? app.graph

/**
 * A video with what is said and asked below it, as a widget of the node, which takes no place until there is something
 * to play.
 * It is there from the beginning, since Nodes 2.0 does not show a widget that is added later (frontend 1.32).
 */
class Player {
    constructor(node) {
        this.node = node
        this.session = null
        this.feeding = null // what ends the request of MediaSource
        this.cut = false // it has ended before the file
        this.video = document.createElement("video")
        Object.assign(this.video, { muted: true, controls: true, playsInline: true })
        this.video.setAttribute("aria-label", words().video)
        this.video.style.cssText = "width: 100%; flex: 1; min-height: 0; background: black; border-radius: 4px"
        this.video.addEventListener("ended", () => this.playFinished())
        this.video.addEventListener("error", () => this.playFinished())
        this.state = document.createElement("span") // is read out when it changes; the numbers are not
        this.state.setAttribute("role", "status")
        this.numbers = document.createElement("span")
        const line = document.createElement("div")
        line.style.cssText = "font: 12px sans-serif; padding: 4px 2px; color: var(--input-text, #ddd)"
        line.append(this.state, this.numbers)
        this.steering = new Steering()
        this.element = document.createElement("div")
        this.element.className = "helios-live"
        // contain: in Nodes 2.0 a long line would otherwise make it wider than its node.
        this.element.style.cssText = "display: none; flex-direction: column; width: 100%; height: 100%; contain: inline-size"
        this.element.append(this.video, line, this.steering.element)
        // Space and arrows are the video's while it has the focus, not the graph's.
        this.element.addEventListener("keydown", event => event.stopPropagation())
        this.widget = node.addDOMWidget("live_video", "helios_live", this.element, {
            serialize: false,
            hideOnZoom: false,
            getMinHeight: () => (this.session ? HEIGHT + this.steering.height : 0),
        })
        this.widget.serialize = false
        this.widget.hidden = true
        const removed = node.onRemoved
        node.onRemoved = function (...args) {
            player.close()
            return removed?.apply(this, args)
        }
        const player = this
    }

    isRunning() {
        return this.session?.state === "running"
    }

    /** Play this session, or say what has become of it. */
    show(session) {
        const other = session.id !== this.session?.id
        const height = this.session ? this.steering.height : null
        this.session = session
        this.steering.show(session)
        if (this.steering.height !== height) this.fit()
        if (other) {
            const late = session.written > LATE * session.chunk_frames
            if (session.file) this.playFinished()
            else if (session.state === "running") this.watch(late ? "key" : "start")
        } else if (session.state === "running" && (this.video.error || (this.cut && !this.video.paused))) this.watch("key")
        else if (this.video.ended || this.video.error || this.cut) this.playFinished()
        this.tell()
    }

    /** As large as what there is to show. */
    fit() {
        this.widget.hidden = false
        this.element.style.display = "flex"
        this.element.style.minHeight = `${HEIGHT + this.steering.height}px`
        const [width, height] = this.node.computeSize()
        this.node.setSize([Math.max(this.node.size[0], width), Math.max(this.node.size[1], height)])
    }

    /** Play the file as it grows: through MediaSource, or, where a content policy forbids that, as a plain source. */
    watch(from) {
        const url = this.address(`?from=${from}`)
        this.stopFeeding()
        this.cut = false
        const { signal } = (this.feeding = new AbortController())
        const plainly = () => {
            plainOnly ||= this.video.error !== null
            this.video.src = url
            this.begin()
        }
        const failed = () => {
            if (signal.aborted) return
            if (!this.video.readyState || this.video.error) return plainly()
            this.cut = true // by a server that is gone, or has waited too long for a player that is paused
            if (!this.isRunning()) this.playFinished()
        }
        if (plainOnly) plainly()
        else feed(this.video, url, signal).catch(failed)
        this.begin()
    }

    begin() {
        this.video.play().catch(() => {}) // a browser may want a click first
    }

    /** The plain file, in which one can seek, once the growing one has ended or cannot be played. */
    playFinished() {
        const url = this.address("")
        if (!this.session.file || this.video.src.endsWith(url)) return
        const place = this.cut ? this.video.currentTime : 0
        this.stopFeeding()
        this.cut = false
        this.video.src = url
        this.video.currentTime = place
    }

    address(query) {
        return api.apiURL(`/helios/live/${this.session.id}.mp4${query}`)
    }

    stopFeeding() {
        this.feeding?.abort()
        this.feeding = null
    }

    tell() {
        const { state, written, frames, rate, fps, chunk_frames } = this.session
        const text = words()
        if (this.state.textContent !== text[state]) this.state.textContent = text[state]
        const parts = ["", text.numbers(written, frames)]
        const { buffered, currentTime } = this.video
        if (state === "running" && buffered.length)
            parts.push(text.buffered(Math.max(0, buffered.end(buffered.length - 1) - currentTime).toFixed(1)))
        if (rate) parts.push(text.speed((rate / chunk_frames).toFixed(2), (rate / fps).toFixed(2)))
        this.numbers.textContent = parts.join(" · ")
    }

    close() {
        this.stopFeeding()
        this.video.removeAttribute("src")
        this.video.load() // ends its request
    }
}

const players = new WeakMap()
let waiting = 0 // graphs in the server's queue

async function refresh() {
    const shown = playersWithIds(rootGraph())
    if (!shown.size) return
    const response = await api.fetchApi("/helios/live")
    if (!response.ok) return
    const { sessions } = await response.json()
    for (const [player, ids] of shown) {
        const session = sessions
            .filter(({ node, workflow }) => ids.includes(node) && (!workflow || workflow === rootGraph().id))
            .at(-1)
        if (session && (player.session || session.file || session.state === "running")) player.show(session)
        else if (player.isRunning()) player.show({ ...player.session, state: "stopped" }) // the server began anew
    }
}

const anyRunning = () => [...playersWithIds(rootGraph()).keys()].some(player => player.isRunning())

app.registerExtension({
    name: "Helios.Live",
    nodeCreated(node) {
        if (node.comfyClass === NODE) players.set(node, new Player(node))
    },
    setup() {
        api.addEventListener("status", ({ detail }) => {
            waiting = detail?.exec_info?.queue_remaining ?? 0
        })
        setInterval(() => {
            if (waiting || anyRunning()) refresh().catch(() => {}) // the server may be starting again
        }, POLL)
    },
    afterConfigureGraph() {
        refresh().catch(() => {})
    },
})
