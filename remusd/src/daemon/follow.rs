//! Answers of more than one message: events, status that changes, a protection that is followed.

use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::Daemon;
use super::ends::ended_as;
use super::jobs::{Begun, is_job_end};
use crate::api::server::Answer;
use crate::api::{ApiError, ErrorCode, Reply};
use crate::ops::{Delivery, Event, Filter, Subscription};
use crate::protect::driver::Order;

/// How often a status that is followed is sent although nothing has happened: ages grow by themselves.
const REFRESH: Duration = Duration::from_secs(1);

/// Most often that it is sent.
const NOT_BEFORE: Duration = Duration::from_millis(50);

fn reply(delivery: Delivery) -> Reply {
    match delivery {
        Delivery::Event(event) => Reply::Event(Event::clone(&event)),
        Delivery::Missed(count) => Reply::Missed(count),
    }
}

impl Daemon {
    /// Past and later events, until the client hangs up or the log ends.
    pub(super) async fn follow_events(&self, filter: Filter, answer: &Answer) {
        let (past, mut live) = self.log.subscribe_to(filter);
        for event in past {
            if !answer.send(Reply::Event(Event::clone(&event))).await {
                return;
            }
        }
        loop {
            let delivery = tokio::select! {
                delivery = live.next() => delivery,
                () = answer.client_gone() => return,
            };
            let Some(delivery) = delivery else { return };
            if !answer.send(reply(delivery)).await {
                return;
            }
        }
    }

    /// The status now and whenever it changes, until the client hangs up.
    pub(super) async fn watch_status(&self, domain: Option<&str>, answer: &Answer) -> Result<(), ApiError> {
        let mut changed = self.changed.subscribe();
        let (_, mut events) = self.log.subscribe();
        let mut refresh = tokio::time::interval(REFRESH);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let rows = self.rows(domain).await?;
            if !answer.send(Reply::Rows(rows)).await {
                return Ok(());
            }
            tokio::time::sleep(NOT_BEFORE).await;
            changed.mark_unchanged();
            while events.try_next().is_some() {}
            tokio::select! {
                _ = changed.changed() => {}
                _ = events.next() => {}
                _ = refresh.tick() => {}
                () = answer.client_gone() => return Ok(()),
            }
        }
    }

    /// Stays with a protection that is being started: its events and progress, then how it became protected; in the foreground how it
    /// ended. A client that goes away ends a foreground protection.
    pub(super) async fn follow_protect(
        &self,
        begun: Begun,
        mut live: Subscription,
        answer: &Answer,
        foreground: bool,
    ) -> Result<serde_json::Value, ApiError> {
        let Begun { id, domain, waiter, mut progress } = begun;
        let Some(waiter) = waiter else { return Ok(serde_json::json!({ "job": id })) };
        let mut outcome = std::pin::pin!(waiter.outcome());
        let result = loop {
            tokio::select! {
                biased;
                Some(delivery) = live.next() => pass_on(delivery, answer).await,
                outcome = &mut outcome => break outcome.into_result(),
                Ok(()) = progress.changed() => {
                    let now = *progress.borrow_and_update();
                    if let Some(now) = now {
                        answer.send(Reply::Progress(now)).await;
                    }
                }
                () = answer.client_gone() => {
                    if !foreground {
                        // It goes on without the client.
                        return Ok(serde_json::Value::Null);
                    }
                    let _ = self.operations.abort(id);
                    break outcome.await.into_result();
                }
            }
        };
        let result = match result {
            Ok(_) if foreground => self.follow_to_the_end(&domain.uuid.to_string(), &mut live, answer).await,
            other => other,
        };
        // What was published before the end was seen.
        while let Some(delivery) = live.try_next() {
            pass_on(delivery, answer).await;
        }
        result
    }

    async fn follow_to_the_end(
        &self,
        uuid: &str,
        live: &mut Subscription,
        answer: &Answer,
    ) -> Result<serde_json::Value, ApiError> {
        let Some((_, handle)) = self.primary_of(uuid).await else {
            return Err(ApiError::new(ErrorCode::Failed, "the protection is gone; see the log"));
        };
        let mut ended = std::pin::pin!(handle.ended());
        loop {
            tokio::select! {
                biased;
                Some(delivery) = live.next() => pass_on(delivery, answer).await,
                outcome = &mut ended => return ended_as(outcome),
                () = answer.client_gone() => {
                    handle.order(Order::Stop);
                    return ended_as(ended.await);
                }
            }
        }
    }
}

async fn pass_on(delivery: Delivery, answer: &Answer) {
    // The job's end is the answer itself.
    if !matches!(&delivery, Delivery::Event(event) if is_job_end(event.kind)) {
        answer.send(reply(delivery)).await;
    }
}
