//! How a protection's end is told, depending on what was asked for.

use crate::api::{ApiError, ErrorCode};
use crate::ops::operation::Progress;
use crate::ops::{Outcome, Work};
use crate::protect::driver::{Handle, Order};
use crate::protect::machine;

/// Waits until the guest is protected, or told to give up, or cannot be.
pub(super) async fn until_protected(work: &Work, handle: &Handle, total: u64) -> Outcome {
    let mut sent = handle.sent.clone();
    let mut snapshot = handle.snapshot.clone();
    loop {
        tokio::select! {
            biased;
            outcome = handle.ended() => return not_protected(outcome),
            // Without the channel's guard, which must not live across an await.
            Ok(()) = async { snapshot.wait_for(|s| s.protected).await.map(drop) } => return Outcome::done("protected"),
            () = work.aborted() => {
                handle.order(Order::Stop);
                return match handle.ended().await {
                    machine::Outcome::Stopped | machine::Outcome::NotStarted(_) => {
                        Outcome::Cancelled("aborted: the guest runs on unprotected, no copy is left".into())
                    }
                    other => not_protected(other),
                };
            }
            Ok(()) = sent.changed() => {
                let now = *sent.borrow_and_update();
                work.progress(Progress { pages: now.pages, total: total.max(now.pages), bytes: now.bytes });
            }
        }
    }
}

/// A protection that has ended before it was one.
fn not_protected(outcome: machine::Outcome) -> Outcome {
    match outcome {
        machine::Outcome::Stopped => Outcome::Cancelled("protection was ended before the guest was protected".into()),
        other => ended_as(other).map_or_else(Outcome::Failed, |value| {
            let text = value.get("message").and_then(|m| m.as_str()).unwrap_or_default().to_owned();
            Outcome::Failed(ApiError::new(ErrorCode::Failed, text))
        }),
    }
}

/// A protection's end as the answer of a call that stayed with it.
pub(super) fn ended_as(outcome: machine::Outcome) -> Result<serde_json::Value, ApiError> {
    use machine::Outcome::{Alone, GuestEnded, HandedOver, NotStarted, Stopped, Superseded};
    let message = |text: String| Ok(serde_json::json!({ "message": text }));
    match outcome {
        Stopped => message("protection has ended; no copy is left".into()),
        GuestEnded(end) => message(format!("the guest has ended: {end}")),
        NotStarted(text) | Alone(text) => {
            Err(ApiError::new(ErrorCode::Failed, format!("The guest runs on, UNPROTECTED: {text}")))
        }
        HandedOver(text) => message(format!("handed over: {text}")),
        Superseded(text) => Err(ApiError::new(ErrorCode::Conflict, text)),
    }
}

/// A protection's end as the outcome of the wish to end it.
pub(super) fn unprotected(name: &str, outcome: machine::Outcome) -> Outcome {
    use machine::Outcome::{Alone, GuestEnded, HandedOver, NotStarted, Stopped, Superseded};
    match outcome {
        Stopped => Outcome::done(format!("{name} is not protected any more and runs on; no copy is left")),
        NotStarted(text) => Outcome::done(format!("The protection of {name} was given up: {text}")),
        Alone(text) => Outcome::done(format!("{name} runs on unprotected: {text}")),
        GuestEnded(end) => Outcome::done(format!("{name} has ended meanwhile ({end})")),
        Superseded(text) | HandedOver(text) => {
            Outcome::Failed(ApiError::new(ErrorCode::Conflict, format!("{name} runs elsewhere: {text}")))
        }
    }
}
