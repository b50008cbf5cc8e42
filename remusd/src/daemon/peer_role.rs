//! What the other host says it is to a protection.

use std::time::Duration;

use crate::ids::ProtectionId;
use crate::link::{LinkError, LinkOptions, PrimaryLink, Role, Transport};
use crate::ops::Backoff;

/// One answer may take this long: a connection by ssh has to be made first.
const ANSWER: Duration = Duration::from_secs(10);
/// Between questions.
const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(2);
/// How long an activation under way is waited for.
const ACTIVATION: Duration = Duration::from_secs(120);
/// Least time in which somebody must answer at all.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks once, over a connection of its own.
///
/// # Errors
/// [`LinkError`]: nobody answers, or not as remusd does.
pub(super) async fn ask(transport: &Transport, uuid: ProtectionId) -> Result<Role, LinkError> {
    let options = LinkOptions { handshake_timeout: ANSWER, ..LinkOptions::default() };
    let entries = PrimaryLink::query(transport, Some(uuid), &options).await?;
    Ok(entries.iter().find(|entry| entry.protection == uuid).map_or(Role::None, |entry| entry.role))
}

/// Whether the other host runs the guest, as it says itself; in words. An activation is waited for, silence for two detection times and
/// at least five seconds.
pub(super) async fn whether_it_runs<F: Future<Output = Result<Role, LinkError>>>(
    name: &str,
    detection: Duration,
    ask: impl Fn() -> F,
) -> Option<String> {
    let mut backoff = Backoff::new(FIRST, LONGEST, ACTIVATION).ok()?;
    let silent_until = tokio::time::Instant::now() + PATIENCE.max(detection * 2);
    loop {
        let asked = tokio::time::timeout_at(silent_until.max(tokio::time::Instant::now() + LONGEST), ask()).await;
        match asked {
            Ok(Ok(Role::Active)) => return Some(format!("{name} has activated its copy while this host slept")),
            Ok(Ok(Role::Activating)) => {}
            Ok(Ok(_)) => return None,
            Ok(Err(_)) | Err(_) if tokio::time::Instant::now() >= silent_until => return None,
            Ok(Err(_)) | Err(_) => {}
        }
        backoff.wait().await.ok()?;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// What follows from these answers, of which the last is given for ever, and how many seconds it took.
    async fn after(answers: &[Option<Role>]) -> (bool, u64) {
        let left = Mutex::new(answers.to_vec());
        let start = tokio::time::Instant::now();
        let ask = || {
            let mut left = left.lock().unwrap();
            let answer = if left.len() > 1 { left.remove(0) } else { left[0] };
            std::future::ready(answer.ok_or(LinkError::Closed))
        };
        let runs = whether_it_runs("hostb", Duration::from_secs(1), ask).await;
        (runs.is_some(), start.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn who_runs_it_is_believed_who_activates_it_is_waited_for_and_silence_has_an_end() {
        assert_eq!(after(&[Some(Role::Active)]).await, (true, 0));
        for role in [Role::None, Role::Syncing, Role::Armed, Role::Discarded] {
            assert_eq!(after(&[Some(role)]).await, (false, 0), "{role:?}");
        }
        assert!(after(&[None, None, Some(Role::Activating), Some(Role::Active)]).await.0);
        let (runs, seconds) = after(&[None]).await;
        assert!(!runs && (5..=8).contains(&seconds), "{seconds} s");
        let (runs, seconds) = after(&[Some(Role::Activating)]).await;
        assert!(!runs && seconds == 120, "{seconds} s");
    }
}
