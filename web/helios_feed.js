// A file that grows, fed to a <video> through MediaSource, which can let go of what was played.

const AHEAD = 30 // seconds that are fetched before they are due; the rest waits in the server's file
const BEHIND = 5 // seconds that stay after they were played
const AVC_CONFIGURATION = [0x61, 0x76, 0x63, 0x43] // "avcC"

const pause = milliseconds => new Promise(resolve => setTimeout(resolve, milliseconds))

function once(target, event, failure) {
    const settled = new AbortController() // takes both listeners away: every block of the file has its own
    return new Promise((resolve, reject) => {
        target.addEventListener(event, resolve, { signal: settled.signal })
        failure.addEventListener("error", reject, { signal: settled.signal })
    }).finally(() => settled.abort())
}

/** "avc1.64001f" of the bytes with which an h264 file begins; null where they are too few. */
function codecOf(bytes) {
    const at = bytes.findIndex((_, i) => AVC_CONFIGURATION.every((letter, k) => bytes[i + k] === letter))
    if (at < 0 || bytes.length < at + 8) return null
    const profile = [...bytes.slice(at + 5, at + 8)].map(byte => byte.toString(16).padStart(2, "0")).join("")
    return `avc1.${profile}`
}

function joined(first, second) {
    const both = new Uint8Array(first.length + second.length)
    both.set(first)
    both.set(second, first.length)
    return both
}

/** Play the file at this address to its end. Rejects where there is no MediaSource, or a policy forbids it. */
export async function feed(video, url, signal) {
    const source = new MediaSource()
    const address = URL.createObjectURL(source)
    try {
        video.src = address
        await once(source, "sourceopen", video)
    } finally {
        URL.revokeObjectURL(address)
    }
    const response = await fetch(url, { signal })
    if (!response.ok) throw new Error(`${url} answered ${response.status}`)
    const reader = response.body.getReader()
    let buffer = null
    let data = new Uint8Array()
    for (;;) {
        const { done, value } = await reader.read()
        if (done) break
        data = joined(data, value)
        if (!buffer) {
            const codec = codecOf(data)
            if (!codec) continue
            buffer = source.addSourceBuffer(`video/mp4; codecs="${codec}"`)
        }
        buffer.appendBuffer(data)
        data = new Uint8Array()
        await once(buffer, "updateend", buffer)
        await keepNear(video, buffer, signal)
    }
    if (source.readyState === "open") source.endOfStream()
}

/** Go to where the buffer begins, let go of what was played, and wait while enough is there. */
async function keepNear(video, buffer, signal) {
    for (;;) {
        signal.throwIfAborted()
        if (!buffer.buffered.length) return
        const [begin, end] = [buffer.buffered.start(0), buffer.buffered.end(buffer.buffered.length - 1)]
        if (video.currentTime < begin) video.currentTime = begin
        if (video.currentTime - begin > 2 * BEHIND) {
            buffer.remove(begin, video.currentTime - BEHIND)
            await once(buffer, "updateend", buffer)
        }
        if (end - video.currentTime < AHEAD) return
        await pause(500)
    }
}
