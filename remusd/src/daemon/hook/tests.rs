//! The hook as a real program.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::sys::stat::Mode;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::unix::pipe;

use super::*;
use crate::ids::{DomId, ProtectionId};
use crate::ops::{DomainRef, EventKind};

const SOON: Duration = Duration::from_secs(60);

/// A folder with a program that writes lines to a pipe, and can wait for lines from another.
struct Told {
    dir: tempfile::TempDir,
    log: EventLog,
    lines: Lines<BufReader<pipe::Receiver>>,
    gate: pipe::Sender,
}

impl Told {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let both = |name: &str| {
            let path = dir.path().join(name);
            nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
            let mut options = pipe::OpenOptions::new();
            // Held open for both, so that neither the program nor this waits for the other to open it.
            options.read_write(true);
            (options, path)
        };
        let (options, told) = both("told");
        let lines = BufReader::new(options.open_receiver(told).unwrap()).lines();
        let (options, gate) = both("gate");
        let gate = options.open_sender(gate).unwrap();
        Self { dir, log: EventLog::default(), lines, gate }
    }

    /// A program of this text, which may use `tell WORDS` and `wait_for_gate`.
    fn program(&self, name: &str, text: &str) -> PathBuf {
        let dir = self.dir.path().display();
        let helpers = format!("tell() {{ echo \"$*\" >{dir}/told; }}\nwait_for_gate() {{ read -r _ <{dir}/gate; }}\n");
        write(self.dir.path(), name, &format!("#!/bin/sh\ncd {dir}\n{helpers}{text}\n"))
    }

    fn settings(&self, text: &str) -> Events {
        Events { hook: Some(self.program("hook", text)), hook_timeout_ms: 60_000, ..Events::default() }
    }

    fn publish(&self, kind: EventKind, detail: &str) {
        let domain = DomainRef { domid: Some(DomId(3)), name: "web".into(), uuid: ProtectionId::from_u128(1) };
        self.log.publish(domain, kind, detail);
    }

    async fn hears(&mut self) -> String {
        let line = tokio::time::timeout(SOON, self.lines.next_line()).await.expect("a line in time");
        line.unwrap().unwrap()
    }

    async fn open_gate(&mut self, times: usize) {
        self.gate.write_all("\n".repeat(times).as_bytes()).await.unwrap();
    }
}

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    // A script that another thread's child still has open for writing cannot be executed, so it is written under another name.
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
    assert!(std::process::Command::new("cp").arg(&new).arg(&path).status().unwrap().success());
    path
}

/// Whether a process runs: one that nobody has waited for yet does not.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

#[tokio::test]
async fn events_are_told_one_after_the_other_as_json_and_in_the_environment() {
    let mut told = Told::new();
    let text = "mkdir lock || tell two at once\nIFS= read -r line\ntell \"$REMUS_SEQ $REMUS_EVENT_KIND $REMUS_ALARM $REMUS_DOMAIN $REMUS_DOMID \
                $REMUS_UUID $REMUS_EVENTS_MISSED\"\nprintf '%s\\n' \"$line\" >json.$REMUS_SEQ\nprintf %s \"$REMUS_DETAIL\" >detail\nrmdir lock\n\
                tell end";
    let _hook = Hook::start(&told.log, told.settings(text));
    for (seq, kind) in [(1, EventKind::Protecting), (2, EventKind::Protected), (3, EventKind::Unprotected)] {
        let detail = format!("line {seq}\nwith \"quotes\", ü and \0{}", "x".repeat(200_000));
        told.publish(kind, &detail);
    }
    for (seq, kind, alarm) in [(1, "protecting", 0), (2, "protected", 0), (3, "unprotected", 1)] {
        let uuid = ProtectionId::from_u128(1);
        assert_eq!(told.hears().await, format!("{seq} {kind} {alarm} web 3 {uuid} 0"));
        assert_eq!(told.hears().await, "end");
        let json = std::fs::read(told.dir.path().join(format!("json.{seq}"))).unwrap();
        let event: Event = serde_json::from_slice(&json).unwrap();
        assert_eq!(event, *told.log.kept(&crate::ops::Filter::default())[seq - 1], "all of it");
    }
    let detail = std::fs::read_to_string(told.dir.path().join("detail")).unwrap();
    assert!(detail.starts_with("line 3\nwith") && detail.len() <= 4096, "cut, and without what no variable can hold");
}

#[tokio::test]
async fn what_takes_too_long_is_killed_with_what_it_has_started_and_the_next_is_told() {
    let mut told = Told::new();
    let text = "[ $REMUS_SEQ = 2 ] && { tell second $REMUS_EVENTS_MISSED; exit; }\nsleep 1000 &\ntell $!\nwait";
    let settings = Events { hook_timeout_ms: 300, ..told.settings(text) };
    let _hook = Hook::start(&told.log, settings);
    told.publish(EventKind::Protected, "x");
    told.publish(EventKind::Protected, "x");
    let sleeper = told.hears().await;
    assert!(runs(&sleeper));
    assert_eq!(told.hears().await, "second 0", "the first was told, it only took too long");
    assert!(!runs(&sleeper));
}

#[tokio::test]
async fn a_slow_program_holds_nobody_up_and_is_told_how_much_it_missed() {
    let mut told = Told::new();
    let _hook = Hook::start(&told.log, told.settings("tell $REMUS_SEQ $REMUS_EVENTS_MISSED\nwait_for_gate"));
    // More than the log itself keeps for a slow subscriber (1024), with nobody to take them meanwhile.
    let count = 1024 + 10;
    for _ in 0..count {
        told.publish(EventKind::Protected, "x");
    }
    assert_eq!(told.hears().await, "11 10", "what the log could not keep");
    told.open_gate(1).await;
    let first = count - QUEUE + 1;
    assert_eq!(told.hears().await, format!("{first} {}", first - 12), "what the queue could not");
    told.open_gate(1).await;
    assert_eq!(told.hears().await, format!("{} 0", first + 1));
}

#[tokio::test]
async fn only_the_kinds_that_were_asked_for_are_told_and_settings_hold_at_once() {
    let mut told = Told::new();
    let settings = told.settings("tell $REMUS_SEQ $REMUS_EVENTS_MISSED");
    let hook = Hook::start(&told.log, Events { hook_kinds: Some(vec![EventKind::Unprotected]), ..settings.clone() });
    for kind in [EventKind::Protected, EventKind::Unprotected, EventKind::Stopped, EventKind::Unprotected] {
        told.publish(kind, "x");
    }
    assert_eq!((told.hears().await, told.hears().await), ("2 0".into(), "4 0".into()), "and none of them missed");

    hook.set(Events { hook: None, ..settings.clone() });
    told.publish(EventKind::Unprotected, "nobody hears this");
    settled().await;
    let other = told.program("other", "tell other $REMUS_SEQ $REMUS_EVENTS_MISSED");
    hook.set(Events { hook: Some(other), ..settings });
    told.publish(EventKind::Protected, "x");
    assert_eq!(told.hears().await, "other 6 0");
}

/// Lets every task of this thread's runtime do what it can do without waiting.
async fn settled() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_program_that_cannot_be_run_is_told_what_it_missed_once_it_can() {
    let mut told = Told::new();
    let path = told.dir.path().join("hook");
    let _hook = Hook::start(&told.log, Events { hook: Some(path), ..Events::default() });
    told.publish(EventKind::Protected, "x");
    told.publish(EventKind::Protected, "x");
    settled().await;
    told.program("hook", "tell $REMUS_SEQ $REMUS_EVENTS_MISSED");
    told.publish(EventKind::Protected, "x");
    assert_eq!(told.hears().await, "3 2");
}

#[tokio::test]
async fn the_daemons_end_waits_for_the_last_words_but_not_for_ever() {
    let mut told = Told::new();
    let hook = Hook::start(&told.log, told.settings("tell $REMUS_SEQ"));
    for _ in 0..3 {
        told.publish(EventKind::Stopped, "x");
    }
    hook.finish(SOON).await;
    assert_eq!([told.hears().await, told.hears().await, told.hears().await], ["1", "2", "3"]);
    assert_eq!(told.log.subscribers(), 0);

    let hook = Hook::start(&told.log, told.settings("trap '' TERM\nsleep 1000 &\ntell $!\nwait"));
    told.publish(EventKind::Stopped, "x");
    let sleeper = told.hears().await;
    let begin = Instant::now();
    hook.finish(Duration::from_millis(100)).await;
    assert!(begin.elapsed() < SOON / 2, "the program would take {:?}", Duration::from_secs(1000));
    // Killed, which takes the kernel a moment.
    let gone = async {
        while runs(&sleeper) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, gone).await.expect("nothing is left of it");
}

/// `scripts/event-webhook` with a curl that shows what it was given.
#[test]
fn the_webhook_posts_what_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/event-webhook");
    let curl = "#!/bin/bash\nfor a; do echo \"argument $a\"; case $a in @-) cat ;; @*) cat \"${a#@}\" ;; esac; done\n[ \"${!#}\" != http://refused ] || exit 22\n";
    write(dir.path(), "curl", curl);
    let run = |conf: &str, url: Option<&str>| {
        let path = write(dir.path(), "conf", conf);
        let mut command = std::process::Command::new("bash");
        command.arg(&script).env("REMUS_WEBHOOK_CONF", path).env("REMUS_EVENTS_MISSED", "4");
        command.env("PATH", format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap()));
        match url {
            Some(url) => command.env("REMUS_WEBHOOK_URL", url),
            None => command.env_remove("REMUS_WEBHOOK_URL"),
        };
        let event = std::fs::File::open(write(dir.path(), "event", "{\"seq\": 7}\n")).unwrap();
        let output = command.stdin(event).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, out, _) = run("URL=http://a/b\nHEADERS=('Authorization: Bearer s p')\n", None);
    assert_eq!(code, Some(0));
    let lines: Vec<_> = out.lines().collect();
    for line in
        ["{\"seq\": 7}", "Content-Type: application/json", "X-Remus-Events-Missed: 4", "Authorization: Bearer s p"]
    {
        assert!(lines.contains(&line), "{line}: {out}");
    }
    assert_eq!(lines.last(), Some(&"argument http://a/b"));
    assert!(
        !lines.iter().any(|line| line.starts_with("argument") && line.contains("Bearer")),
        "a secret is no argument"
    );
    assert_eq!(run("", Some("http://refused")).0, Some(22), "curl's own exit code");
    let (code, _, said) = run("", None);
    assert!(code == Some(2) && said.contains("REMUS_WEBHOOK_URL is not set"), "{said}");
}
