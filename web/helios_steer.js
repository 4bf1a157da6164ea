// Below the player, while a run can be steered: the next prompt, its transition, "apply" and "finish".

import { api } from "../../scripts/api.js"
import { words } from "./helios_words.js"

const BOX = 64 // pixels of the prompt
const LINE = 28 // pixels of the line below it
const ENTRY = 20 // pixels of what was applied
const LINES = 2 // of those that are seen without scrolling

function make(tag, style, fields = {}) {
    const element = Object.assign(document.createElement(tag), fields)
    element.style.cssText = `font: 12px sans-serif; color: var(--input-text, #ddd); ${style}`
    return element
}

/** Its element goes below a player; `show` is told about the session again and again. */
export class Steering {
    constructor() {
        this.session = null
        this.answer = null // why the server did not take what was asked for
        const text = words()
        const field = "background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #444)"
        this.prompt = make("textarea", `${field}; width: 100%; height: 56px; resize: none; box-sizing: border-box`)
        this.prompt.placeholder = text.prompt
        this.prompt.setAttribute("aria-label", text.prompt)
        this.prompt.addEventListener("keydown", event => {
            if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.apply()
        })
        this.transition = make("input", `${field}; width: 48px`, { type: "number", min: 0, max: 999, value: 3 })
        this.transition.title = text.transition
        this.transition.setAttribute("aria-label", text.transition)
        this.applyButton = make("button", field, { type: "button", textContent: text.apply })
        this.applyButton.addEventListener("click", () => this.apply())
        this.finishButton = make("button", field, { type: "button", textContent: text.finish })
        this.finishButton.addEventListener("click", () => this.ask({ finish: true }))
        this.state = make("span", "flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap")
        this.state.setAttribute("role", "status")
        this.link = make("a", "", { textContent: text.prompts, download: "" })
        this.line = make("div", "display: flex; gap: 6px; align-items: center; padding: 2px")
        this.line.append(this.transition, this.applyButton, this.finishButton, this.state, this.link)
        this.applied = make("ol", `margin: 0; padding: 0 2px; list-style: none; overflow-y: auto; max-height: ${LINES * ENTRY}px`)
        this.element = make("div", "flex: none", { className: "helios-steering" })
        this.element.append(this.prompt, this.line, this.applied)
        this.height = 0 // pixels that are needed
        this.show(null)
    }

    apply() {
        const prompt = this.prompt.value.trim()
        if (prompt) this.ask({ prompt, transition: Number(this.transition.value) })
    }

    async ask(what) {
        const { id } = this.session
        this.answer = null
        let answer = words().failed
        try {
            const response = await api.fetchApi(`/helios/live/${id}`, {
                method: "POST",
                headers: { "Content-Type": "application/json" },
                body: JSON.stringify(what),
            })
            answer = response.ok ? null : await response.text()
            const steering = response.ok ? await response.json() : null
            if (steering && this.session.id === id) this.session.steering = steering
        } catch {} // the server is gone: it says so
        if (this.session.id !== id) return // another video by now
        this.answer = answer
        this.show(this.session)
    }

    /** The prompts are text that anybody may have sent: they are shown as text. */
    show(session) {
        if (session?.id !== this.session?.id) this.answer = null
        this.session = session
        const { prompts, endless, finishing, waiting, refusal, applied } = session?.steering ?? { applied: [] }
        const running = session?.state === "running"
        const shown = (element, yes, how = "") => (element.style.display = yes ? how : "none")
        for (const element of [this.prompt, this.transition, this.applyButton]) shown(element, running && prompts)
        shown(this.finishButton, running && endless)
        this.finishButton.disabled = finishing
        this.finishButton.textContent = finishing ? words().finishing : words().finish
        shown(this.link, session?.script)
        if (session) this.link.href = api.apiURL(`/helios/live/${session.id}.json`)
        const early = finishing && session.written < session.least ? words().least(session.least) : ""
        this.say(running ? (this.answer ?? (waiting ? words().waiting : (refusal ?? early))) : "")
        this.list(applied)
        const asks = running && (prompts || endless)
        shown(this.line, asks || session?.script, "flex")
        this.height = (running && prompts ? BOX : 0) + (asks || session?.script ? LINE : 0)
        this.height += Math.min(LINES, applied.length) * ENTRY
    }

    /** The newest first; made anew only where there is a new one, so that one can read and scroll. */
    list(applied) {
        const lines = [...applied]
            .reverse()
            .map(({ after_chunk, prompt, transition }) => words().applied(after_chunk, transition) + prompt)
        if (lines.join("\n") === [...this.applied.children].map(entry => entry.title).join("\n")) return
        this.applied.replaceChildren(
            ...lines.map(line => {
                const entry = make("li", "overflow: hidden; text-overflow: ellipsis; white-space: nowrap")
                entry.textContent = entry.title = line
                return entry
            }),
        )
    }

    /** Is read out, so it is written only where it is new. */
    say(what) {
        if (this.state.textContent !== what) this.state.textContent = this.state.title = what
    }
}
