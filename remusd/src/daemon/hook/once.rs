//! One run of the hook.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::link::child::ChildGroup;
use crate::ops::Event;

/// For what was said on standard error, after the program has ended.
const PATIENCE: Duration = Duration::from_millis(200);

/// The kernel takes no variable of more than 128 KiB (MAX_ARG_STRLEN, execve(2)), and all of it is on standard input anyhow.
const LONGEST: usize = 4096;

/// Runs the program in a process group of its own, kills the group when the time is over, and says in the log what went wrong. Returns
/// whether the program could be run at all: it was told then.
pub(super) async fn run(program: PathBuf, event: Arc<Event>, missed: u64, limit: Duration) -> bool {
    let mut command = Command::new(&program);
    command.envs(variables(&event, missed));
    let (mut child, mut stdin, mut stdout) = match ChildGroup::spawn("events.hook", command) {
        Ok(started) => started,
        Err(error) => {
            tracing::error!(seq = event.seq, "events.hook: {} cannot be run: {error}", program.display());
            return false;
        }
    };
    let line = serde_json::to_string(&*event).unwrap_or_default() + "\n";
    let talk = async {
        // It need not read any of it.
        let _ = stdin.write_all(line.as_bytes()).await;
        drop(stdin);
        let _ = tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await;
        std::future::pending::<std::io::Result<ExitStatus>>().await
    };
    let end = async {
        tokio::select! {
            status = child.wait() => status,
            status = talk => status,
        }
    };
    match tokio::time::timeout(limit, end).await {
        Ok(Ok(status)) if status.success() => {}
        Ok(Ok(_)) => {
            let said = child.last_words(PATIENCE).await;
            tracing::warn!(seq = event.seq, "events.hook: {}: {said}", program.display());
        }
        Ok(Err(error)) => tracing::warn!(seq = event.seq, "events.hook: {}: {error}", program.display()),
        Err(_) => {
            child.kill();
            let said = child.last_words(PATIENCE).await;
            let limit = limit.as_millis();
            tracing::warn!(seq = event.seq, "events.hook: {} was killed after {limit} ms: {said}", program.display());
        }
    }
    true
}

/// The main fields for programs that do not read JSON.
fn variables(event: &Event, missed: u64) -> Vec<(&'static str, String)> {
    let domid = event.domain.domid.map(|domid| domid.to_string()).unwrap_or_default();
    vec![
        ("REMUS_EVENT_KIND", event.kind.name().to_owned()),
        ("REMUS_SEQ", event.seq.to_string()),
        ("REMUS_TIME_MS", event.time_ms.to_string()),
        ("REMUS_ALARM", u8::from(event.kind.is_alarm()).to_string()),
        ("REMUS_DOMAIN", plain(&event.domain.name)),
        ("REMUS_DOMID", domid),
        ("REMUS_UUID", event.domain.uuid.to_string()),
        ("REMUS_DETAIL", plain(&event.detail)),
        ("REMUS_HOST", crate::link::handshake::host_name()),
        ("REMUS_EVENTS_MISSED", missed.to_string()),
    ]
}

/// As a variable can hold it: without a NUL, with which nothing could be run, and not too long.
fn plain(text: &str) -> String {
    let mut text = text.replace('\0', "\u{fffd}");
    text.truncate(text.floor_char_boundary(LONGEST));
    text
}
