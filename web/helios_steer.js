// Below the player, while a run can be steered: the next prompt, its transition, "apply" and "finish".

import { api } from "../../scripts/api.js"
import { words } from "./helios_words.js"

const BOX = 100 // pixels of the prompt with its line
const LINE = 28 // pixels of "finish" alone, and of what was applied

function make(tag, style, fields = {}) {
    const element = Object.assign(document.createElement(tag), fields)
    element.style.cssText = `font: 12px sans-serif; color: var(--input-text, #ddd); ${style}`
    return element
}

/** Its element goes below a player; `show` is told about the session again and again. */
export class Steering {
    constructor() {
        this.session = null
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
        this.applied = make("ol", "margin: 0; padding: 0 2px; list-style: none; overflow-y: auto; max-height: 56px")
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
        let answer = words().failed
        try {
            const response = await api.fetchApi(`/helios/live/${id}`, {
                method: "POST",
                headers: { "Content-Type": "application/json" },
                body: JSON.stringify(what),
            })
            if (response.ok && this.session.id === id) {
                this.session.steering = await response.json()
                this.show(this.session)
                return
            }
            answer = await response.text()
        } catch {} // the server is gone: it says so
        this.say(answer)
    }

    /** The prompts are text that anybody may have sent: they are shown as text. */
    show(session) {
        this.session = session
        const { prompts, endless, finishing, waiting, refusal, applied } = session?.steering ?? { applied: [] }
        const running = session?.state === "running"
        const shown = (element, yes) => (element.style.display = yes ? "" : "none")
        for (const element of [this.prompt, this.transition, this.applyButton]) shown(element, running && prompts)
        shown(this.finishButton, running && endless)
        this.finishButton.disabled = finishing
        this.finishButton.textContent = finishing ? words().finishing : words().finish
        shown(this.link, session?.file && applied.length)
        if (session) this.link.href = api.apiURL(`/helios/live/${session.id}.json`)
        this.say(running ? (waiting ? words().waiting : (refusal ?? "")) : "")
        this.applied.replaceChildren(
            ...[...applied].reverse().map(({ after_chunk, prompt, transition }) => {
                const entry = make("li", "overflow: hidden; text-overflow: ellipsis; white-space: nowrap")
                entry.textContent = entry.title = words().applied(after_chunk, transition) + prompt
                return entry
            }),
        )
        const lines = Math.min(2, applied.length) + (running && !prompts && endless ? 1 : 0)
        this.height = (running && prompts ? BOX : 0) + lines * LINE
        shown(this.element, this.height > 0)
        this.line.style.display = this.height ? "flex" : "none"
    }

    /** Is read out, so it is written only where it is new. */
    say(what) {
        if (this.state.textContent !== what) this.state.textContent = this.state.title = what
    }
}
