// What the player says, in the page's language.

import { app } from "../../scripts/app.js"

const ENGLISH = {
    video: "The video while it is made",
    running: "Live",
    finished: "Finished",
    stopped: "Stopped before the end",
    numbers: (made, all) => (all === null ? `${made} frames` : `${made} of ${all} frames`),
    buffered: seconds => `${seconds} s buffered`,
    speed: (chunks, times) => `${chunks} chunks/s, ${times} × real time`,
    prompt: "The next prompt: describe the whole picture",
    transition: "Transition in chunks",
    apply: "Apply",
    finish: "Finish",
    finishing: "Finishing",
    waiting: "Comes with the next chunk",
    failed: "The server did not answer",
    applied: (after, transition) => `After chunk ${after}, in ${Math.max(1, transition)}: `,
    prompts: "Prompts of this video (JSON)",
}
const CHINESE = {
    video: "生成中的视频",
    running: "直播",
    finished: "已完成",
    stopped: "提前停止",
    numbers: (made, all) => (all === null ? `${made} 帧` : `${made} / ${all} 帧`),
    buffered: seconds => `已缓冲 ${seconds} 秒`,
    speed: (chunks, times) => `${chunks} 块/秒，实时的 ${times} 倍`,
    prompt: "下一个提示词：描述整个画面",
    transition: "过渡（块）",
    apply: "应用",
    finish: "结束",
    finishing: "正在结束",
    waiting: "将在下一块生效",
    failed: "服务器没有响应",
    applied: (after, transition) => `第 ${after} 块之后，${Math.max(1, transition)} 块过渡：`,
    prompts: "此视频的提示词 (JSON)",
}

export function words() {
    const locale = app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? navigator.language
    return String(locale).startsWith("zh") ? CHINESE : ENGLISH
}
