"""The method: losses, reference policy, scoring, schedule, trainer."""
